"""The selftest: that it finds what is wrong, whatever it is, and tells it."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_fused_lora
from jax_fused_lora import Implementation, bench, cli, implementations, selftest
from jax_fused_lora.bench import WrongResult
from jax_fused_lora.cases import OPS, Case
from jax_fused_lora.selftest import Check, Duel, Timing

SHAPES = ((1, 1, 1, 1), (3, 20, 30, 4))
LAYER = Case("lora_linear", 1, 32, 32, 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two implementations, two shapes, one timed case, duels on a small layer."""
    two = {name: each for name, each in implementations().items() if name in ("cpu", "xla")}
    monkeypatch.setattr(selftest, "implementations", lambda: two)
    monkeypatch.setattr(selftest, "SHAPES", SHAPES)
    monkeypatch.setattr(selftest, "TIMED", (replace(LAYER, chain=2),))
    monkeypatch.setattr(selftest, "SECONDS", 0.0)
    monkeypatch.setattr(selftest, "CONTESTANTS", ("cpu", "xla"))
    monkeypatch.setattr(selftest, "LAYER", LAYER)
    monkeypatch.setattr(selftest, "ROWS", (1, 2))


@pytest.fixture
def broken(monkeypatch):
    """Puts a change around the ops of implementation "cpu": `broken(lambda op, operands: ...)`."""

    def put(change, ops=OPS):
        def around(right):
            def op(*args, implementation, scaling, **operands):
                operands |= dict(zip(("x", "kernel", "lora_a", "lora_b"), args, strict=False))

                def call(**operands):
                    return right(**operands, scaling=scaling, implementation=implementation)

                return change(call, operands) if implementation == "cpu" else call(**operands)

            return op

        for name in ops:
            monkeypatch.setattr(jax_fused_lora, name, around(getattr(jax_fused_lora, name)))

    return put


def lines(out, first):
    """The lines of a report that begin with a word, as lists of words."""
    return [line.split() for line in out.splitlines() if line.split()[:1] == [first]]


def test_all_is_right_here(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--json", str(file)]) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert f"jax {jax.__version__}" in out
    assert out.splitlines()[-1].startswith("Paste this report into an issue of the project")
    assert "…" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 120
    accuracy, speed = lines(out, "cpu")[1:3]  # the first says that cpu is available
    assert accuracy[1::2] == ["ok,"] * 3
    assert speed[:4] == ["cpu", "lora_linear", "forward", "1×32→32"]
    assert "cpu against xla: lora_linear 32→32 rank 4" in out
    assert len(lines(out, "1")) == len(lines(out, "2")) == 1

    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["machine"]["jax"] == jax.__version__
    assert len(report["checks"]) == 2 * 2 * 3 * len(SHAPES)  # implementations, ops, dtypes
    assert all(each["problem"] == "" and each["worst"] <= 1 for each in report["checks"])
    (timing,) = report["timings"]
    assert timing["row"]["ours_us"] > 0
    assert [each["case"]["rows"] for each in report["duels"]] == [1, 2, 1, 2]
    assert list(report["crossings"]) == ["float32", "bfloat16"]
    assert report["steps"] == sum(len(report[name]) for name in ("checks", "timings", "duels"))


def test_quick_times_nothing(monkeypatch, capsys):
    monkeypatch.setattr(bench, "interleave", None)
    assert cli.main(["selftest", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "speed" not in out
    assert "against xla" not in out


def test_a_slightly_wrong_y_is_caught(broken, tmp_path, capsys):
    broken(lambda op, operands: (y := op(**operands)) + jax.lax.stop_gradient(y / 32))
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--quick", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    row = next(words for words in lines(out, "cpu") if "failed," in words)
    assert row[1:4] == ["4", "of", "4"]
    assert [words[1::2] for words in lines(out, "xla")][1] == ["ok,"] * 3
    assert "cpu: lora_linear 3×20→30 rank 4 float32: y has 90 of 90 entries off; worst at (" in out
    assert "12 of 24 steps passed, 12 failed" in out
    for each in json.loads(file.read_text(encoding="utf-8"))["checks"]:
        assert (each["worst"] > 1) == bool(each["problem"]) == (each["implementation"] == "cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", oracle.NAMES)
def test_a_slightly_wrong_gradient_is_caught(broken, op, name):
    def change(op, operands):
        if name in operands:
            o = operands[name]
            operands[name] = o + (o - jax.lax.stop_gradient(o)) / 32  # o, and 33/32 of its gradient
        return op(**operands)

    broken(change)
    check = selftest.check(Check("cpu", op, SHAPES[1], "float32", None))
    if op == "lora_forward" and name in ("kernel", "bias"):
        assert check.problem == ""
    else:
        assert check.problem.startswith(f"gradient of {name} has ")
        assert check.worst > 1


def test_a_race_is_caught(monkeypatch):
    """A result that is wrong in the last run alone."""
    runs = []

    def sometimes(y):
        runs.append(1)
        return y if len(runs) < selftest.REPEATS else y + 1

    def op(x, lora_a, lora_b, **options):
        y = right(x, lora_a, lora_b, **options)
        return y + jax.lax.stop_gradient(
            jax.pure_callback(lambda v: sometimes(v) - v, y, jax.lax.stop_gradient(y))
        )

    right = jax_fused_lora.lora_forward
    monkeypatch.setattr(jax_fused_lora, "lora_forward", op)
    check = selftest.check(Check("cpu", "lora_forward", SHAPES[1], "float32", None))
    assert check.problem.startswith("y has 90 of 90 entries off")


def test_what_is_not_finite_is_caught(broken, tmp_path, capsys):
    broken(lambda op, operands: op(**operands) * jnp.nan, ops=["lora_forward"])
    file = tmp_path / "report.json"
    assert cli.main(["selftest", "--quick", "--json", str(file)]) == 1
    row = next(words for words in lines(capsys.readouterr().out, "cpu") if "failed" in words)
    assert row[1:] == ["2", "of", "4", "failed"] * 3
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text  # neither it nor Infinity is JSON
    assert "Infinity" not in text
    assert [each["worst"] for each in json.loads(text)["checks"]].count(None) == 6


def test_a_case_that_raises_costs_no_other(broken, capsys):
    def change(op, operands):
        if operands["x"].dtype == jnp.float16:
            raise RuntimeError("no float16 [today]")
        return op(**operands)

    broken(change)
    assert cli.main(["selftest", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "rank 4 float16: raised RuntimeError: no float16 [today]" in out
    row = next(words for words in lines(out, "cpu") if "failed" in words)
    assert row[1] == row[3] == "ok,"
    assert row[5:] == ["4", "of", "4", "failed"]
    assert "20 of 24 steps passed, 4 failed" in out


def test_many_failures_are_told_in_few_lines(broken, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "SHAPES", SHAPES[:1] * 5)
    broken(lambda op, operands: op(**operands) + 1)
    assert cli.main(["selftest", "--quick"]) == 1
    out = capsys.readouterr().out
    assert len(lines(out, "cpu:")) == 13
    assert "cpu: and 18 more, which --json writes" in out


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    def measure(case, **options):
        raise WrongResult("ours is not finite")

    monkeypatch.setattr(bench, "measure", measure)
    assert cli.main(["selftest"]) == 1
    out = capsys.readouterr().out
    assert "raised WrongResult: ours is not finite" in out
    assert [words[-1] for words in lines(out, "cpu")].count("failed") == 1
    assert "cpu against xla" in out


def test_an_interrupted_report_is_printed(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stop)
    assert cli.main(["selftest"]) == 1
    out = capsys.readouterr().out
    assert "24 of 29 steps passed, 0 failed; interrupted, 5 were not run" in out


def test_a_folder_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["selftest", "--json", "no/such/folder/x.json"])
    assert exit_info.value.code == 2
    assert "argument --json: no folder no/such/folder" in capsys.readouterr().err


# ---- Which implementations, on which device.


def known(**available):
    platforms = {"cpu": "cpu", "metal": "cpu", "cuda": "cuda", "xla": "any"}
    return {
        name: Implementation(available.get(name, name == "xla"), platform, f"about {name}")
        for name, platform in platforms.items()
    }


@pytest.mark.parametrize(
    ("available", "champion"),
    [({"metal": True, "cpu": True}, "cpu"), ({"metal": True}, "xla"), ({"cpu": True}, None)],
)
def test_metal_is_set_against_the_best_there_is(monkeypatch, available, champion):
    monkeypatch.setattr(selftest, "implementations", lambda: known(**available))
    monkeypatch.setattr(selftest, "CONTESTANTS", ("metal", "cpu"))
    titles = [step.title for step in selftest.plan()]
    duels = [title for title in titles if " against " in title]
    assert len(duels) == (4 if champion else 0)
    assert all(title.startswith(f"metal against {champion}: lora_linear") for title in duels)
    for name in available:
        assert any(title.startswith(f"{name}: lora_forward 3×20→30") for title in titles)
    assert not any(title.startswith("cuda") for title in titles)


def test_an_implementation_without_a_device_is_not_checked(monkeypatch, capsys):
    for module in (cli, selftest):
        monkeypatch.setattr(module, "implementations", lambda: known(cuda=True))
    assert list(selftest.devices()) == ["xla"]
    assert cli.main(["selftest", "--quick"]) == 0
    assert "cuda: not checked, JAX has no cuda device here" in capsys.readouterr().out


def test_with_metal_its_variable_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(cli, "implementations", lambda: known(metal=True))
    monkeypatch.setattr(selftest, "plan", lambda **_: [])
    monkeypatch.setenv("JAX_FUSED_LORA_METAL", "never")
    assert cli.main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "JAX_FUSED_LORA_METAL=auto|always|never" in out
    assert "Here it is never." in out


# ---- The crossing.


def duels(challenger_us, champion_us, dtype="float32"):
    """Duels at 1, 2, 4, ... rows on a fake clock."""

    def timer(case, names):
        return {"metal": challenger_us(case.rows), "cpu": champion_us(case.rows)}

    cases = [Case("lora_linear", 2**i, 64, 64, 4, dtype) for i in range(8)]
    return [selftest.fight(Duel("metal", "cpu", case), timer) for case in cases]


def test_the_crossing():
    fought = duels(lambda rows: 100.0 + rows, lambda rows: 10.0 * rows)
    assert [duel.case.rows for duel in fought if duel.ratio < 1] == [16, 32, 64, 128]
    assert selftest.crossing(fought) == selftest.crossing(fought[::-1]) == 16


def test_who_always_wins_or_never():
    assert selftest.crossing(duels(lambda _: 1.0, lambda _: 2.0)) == 1
    assert selftest.crossing(duels(lambda _: 2.0, lambda _: 1.0)) is None
    assert selftest.crossing(duels(lambda _: 1.0, lambda _: 1.0)) is None  # a draw is no win


def test_a_win_among_losses_is_no_crossing():
    fought = duels(lambda rows: 1.0 if rows in (2, 32, 64, 128) else 3.0, lambda _: 2.0)
    assert selftest.crossing(fought) == 32


def test_a_duel_that_failed_is_no_win():
    fought = duels(lambda _: 1.0, lambda _: 2.0)
    fought[3] = replace(fought[3], challenger_us=None, problem="raised")
    assert np.isnan(fought[3].ratio)
    assert selftest.crossing(fought) == 16


def test_each_dtype_has_its_crossing():
    always, never = (
        duels(lambda _: 1.0, lambda _: 2.0),
        duels(lambda _: 2.0, lambda _: 1.0, "float16"),
    )
    assert selftest.crossings(always + never) == {"float32": 1, "float16": None}
    assert selftest.crossings([]) == {}


def test_implementations_are_timed_in_turns():
    times = selftest.medians(replace(LAYER, chain=2), ("cpu", "xla"))
    assert list(times) == ["cpu", "xla"]
    assert all(each > 0 for each in times.values())


def test_what_was_not_timed_has_no_row():
    assert selftest.fill(Timing("abacus", LAYER, None), jax.devices()[0]).problem.startswith(
        "raised ValueError: implementation is 'abacus', needed None or one of"
    )
