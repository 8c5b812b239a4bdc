"""The bench and the command line: that they measure what they say, never how fast it is."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import jax_fused_lora
from jax_fused_lora import Implementation, bench, cases, cli
from jax_fused_lora.bench import Ratio, Row, WrongResult
from jax_fused_lora.cases import DIRECTIONS, DTYPES, OPS, PRESETS, Case

TINY = ["--rows", "3", "--in", "16", "--out", "24", "--rank", "4", "--seconds", "0.01"]


@pytest.fixture
def short_chain(monkeypatch):
    """Two layers: a chain of 64 takes XLA seconds to compile."""
    monkeypatch.setattr(Case, "layers", 2)


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring; returns the list of what would have been measured."""
    calls = []

    def measure(case, **options):
        calls.append((case, options))
        if case.dtype == "float16":
            raise ValueError("float16 is not for today")
        ratio = Ratio(1.0 if case.rows == 1 else 2.0, 1.0, (0.9, 1.1))
        base = (12.5, ratio) if case.has_kernel else (None, None)
        form = "base / kernel" if case.has_kernel else ""
        return Row(case, form, 2, 7, 123456.0, 123456.0, base[0], ratio, base[1], 1.0, 2.0, 0.0)

    monkeypatch.setattr(bench, "measure", measure)
    return calls


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_measure(short_chain, op, dtype, direction):
    case = Case(op, 3, 16, 24, 4, dtype, direction)
    row = bench.measure(case, seconds=0.0)
    assert row.case == case
    assert row.rounds == bench.MIN_ROUNDS
    assert (row.base_us is not None) == (row.over_base is not None) == (op == "lora_linear")
    assert row.over_xla.medians == pytest.approx(row.ours_us / row.xla_us)
    assert row.over_xla.quartiles[0] <= row.over_xla.pairs <= row.over_xla.quartiles[1]
    assert 0 <= row.error <= bench.TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_result_is_not_timed(short_chain, monkeypatch, dtype):
    monkeypatch.setattr(jax_fused_lora, "lora_linear", lambda x, w, a, b, **_: x @ w)
    with pytest.raises(WrongResult, match="differs from XLA's"):
        bench.measure(Case("lora_linear", 3, 64, 64, 8, dtype), seconds=0.0)


def test_a_result_that_is_not_finite_is_not_timed(short_chain, monkeypatch):
    monkeypatch.setattr(jax_fused_lora, "lora_forward", lambda x, a, b, **_: x * np.nan)
    with pytest.raises(WrongResult, match="ours is not finite"):
        bench.measure(Case("lora_forward", 3, 16, 16, 4), seconds=0.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is the one we tell")
def test_freed_memory_stays_with_the_process():
    """In a process of its own: what it sets cannot be taken back."""
    code = """if True:
        import resource
        import numpy as np
        from jax_fused_lora import bench

        bench.keep_freed_memory()
        faults = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(1 << 26, np.uint8)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*faults)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (int(faults) for faults in run.stdout.split())
    assert second < first / 10


def test_sides_take_turns_in_every_order(monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 60.0)
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("ours", "xla", "base")}
    times = bench.interleave(sides, 0.0)
    assert {len(series) for series in times.values()} == {bench.MIN_ROUNDS}
    turn = bench.SETTLE_CALLS + 1  # some calls that are not timed and one that is
    assert all(len(set(calls[i : i + turn])) == 1 for i in range(0, len(calls), turn))
    turns = calls[::turn]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(set(order) == set(sides) for order in rounds)
    assert len(set(rounds)) == 6


def test_a_slow_side_settles_in_one_call(monkeypatch):
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0.0)
    calls = []
    bench.interleave({"ours": lambda: calls.append("ours")}, 0.0)
    assert len(calls) == 2 * bench.MIN_ROUNDS


def test_all_gradients_leave_the_program(short_chain):
    """What is not returned is not computed, and not measured."""
    sides = bench.sides_of(Case("lora_linear", 3, 16, 24, 4, direction="forward+backward"), None)
    gradients = [(16, 4), (4, 24), (24, 4), (4, 16)]
    y = dx = (3, 16)
    for name in ("ours", "xla"):
        assert [leaf.shape for leaf in jax.tree.leaves(sides[name]())] == [y, dx, *gradients]
    assert [leaf.shape for leaf in jax.tree.leaves(sides["base"]())] == [y, dx]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_passes_follow_each_other(short_chain, direction):
    """On a GPU; here by name."""
    case = Case("lora_linear", 3, 16, 24, 4, direction=direction)
    sides, repeated = bench.sides_of(case), bench.sides_of(case, passes=3)
    for name, side in sides.items():
        x, *rest = side.args
        for _ in range(2):
            x = jax.tree.leaves(side.func(x, *rest))[0]
        chex.assert_trees_all_close(
            jax.tree.leaves(repeated[name]()), jax.tree.leaves(side.func(x, *rest)), rtol=1e-5
        )


def test_of_several_passes_one_is_checked(short_chain, monkeypatch):
    monkeypatch.setattr(Case, "passes", 3)
    checked = []
    check = bench._check
    monkeypatch.setattr(
        bench, "_check", lambda case, sides: checked.append(sides) or check(case, sides)
    )
    case = Case("lora_forward", 3, 16, 24, 4)
    row = bench.measure(case, seconds=0.0)
    assert 0 <= row.error <= bench.TOLERANCES[case.dtype]
    (sides,) = checked
    once = bench.sides_of(case, passes=1)
    for name, side in sides.items():
        chex.assert_trees_all_equal(side(), once[name]())


def test_short_chains_are_repeated_on_gpus(monkeypatch):
    short, long = (Case("lora_linear", 16, width, width, 16, "bfloat16") for width in (1024, 4096))
    assert short.passes == long.passes == 1
    monkeypatch.setattr(cases, "default_platform", lambda: "cuda")
    assert (short.passes, long.passes) == (15, 1)
    times = bench.microseconds(short, {"ours": np.array([0.96e-3])})
    np.testing.assert_allclose(times["ours"], 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    cases = list(PRESETS[preset]())
    assert len(cases) == len(set(cases)) == {"table": 20, "sweep": 1980}[preset]
    for case in cases:
        assert case.layers % 2 == 0
        assert 2 <= case.layers <= 64
        assert case.layers * case.moved_bytes < 2 << 30


def test_operations_and_bytes():
    forward = Case("lora_linear", 5, 8, 12, 2)
    assert forward.flops == 2 * 5 * (8 * 12 + 8 * 2 + 2 * 12)
    assert forward.moved_bytes == 4 * (5 * 8 + 8 * 12 + 8 * 2 + 2 * 12 + 5 * 12)
    both = Case("lora_forward", 5, 8, 12, 2, "bfloat16", "forward+backward")
    low_rank = 8 * 2 + 2 * 12
    assert both.flops == 3 * 2 * 5 * low_rank
    # x, A, B, y; g, x, A, B; dx, dA, dB.
    assert both.moved_bytes == 2 * (3 * 5 * 8 + 2 * 5 * 12 + 3 * low_rank)


def test_bench_end_to_end(short_chain, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["bench", *TINY, "--implementation", "xla", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "lora_linear, forward\n" in out
    assert "3×16→24" in out
    assert f"jax {jax.__version__}" in out
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["machine"]["jax"] == jax.__version__
    (row,) = report["rows"]
    assert row["case"] == asdict(Case("lora_linear", 3, 16, 24, 4))
    assert row["ours_us"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_json_round_trip(measured, tmp_path):
    row = bench.measure(Case("lora_linear", 1, 8, 8, 2))
    file = Path(tmp_path, "rows.json")
    file.write_text("the old one")
    cli.write_json(file, {"jax": "1.2.3"}, [row])
    report = json.loads(file.read_text(encoding="utf-8"))
    read = report["rows"][0]
    ratios = {
        name: Ratio(**{**read[name], "quartiles": tuple(read[name]["quartiles"])})
        for name in ("over_xla", "over_base")
    }
    assert Row(**{**read, **ratios, "case": Case(**read["case"])}) == row
    assert report["machine"] == {"jax": "1.2.3"}


def test_flags_choose_from_a_list(measured):
    cli.main(["bench", "--op", "lora_linear", "--dtype", "float32", "--direction", "forward"])
    assert [case.shape for case, _ in measured] == [
        "1×2048→2048",
        "16×1024→1024",
        "64×1024→1024",
        "2048×2048→2048",
    ]
    measured.clear()
    cli.main(["bench", "--cases", "sweep", "--rows", "1", "--in", "256", "--rank", "8"])
    assert len(measured) == 2 * 2 * 3


def test_the_smallest_case_is_measured_in_two_chains(measured, capsys):
    flags = ["--op", "lora_forward", "--rows", "1", "512", "--direction", "forward"]
    cli.main(["bench", "--cases", "table", *flags])
    assert [case.chain for case, _ in measured] == [16, None, None]
    assert "layers" in capsys.readouterr().out
    measured.clear()
    cli.main(["bench", "--cases", "table", *flags, "--layers", "4"])
    assert [case.chain for case, _ in measured] == [4, 4, 4]
    assert "layers" not in capsys.readouterr().out


def test_flags_make_shapes(measured):
    flags = ["--rows", "1", "7", "--in", "64", "--seconds", "0.5", "--implementation", "xla"]
    assert cli.main(["bench", *flags]) == 0
    options = {"seconds": 0.5, "implementation": "xla"}
    assert measured == [(Case("lora_linear", m, 64, 64, 8), options) for m in (1, 7)]


def test_the_table_is_not_truncated(measured, capsys):
    """A pipe has no width of its own; no line is to be longer than a terminal is wide."""
    flags = ["--in", "2048", "--rows", "1", "2048", "--op", *OPS, "--dtype", "bfloat16"]
    cli.main(["bench", *flags])
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 120
    assert out.count("base / kernel") == 2
    assert "slower than XLA by more than 5%: 2 of 4" in out


def test_a_case_that_fails_costs_no_other(measured, capsys):
    assert cli.main(["bench", "--rows", "1", "--dtype", "float16", "float32"]) == 1
    captured = capsys.readouterr()
    assert "float16 forward: float16 is not for today" in captured.err
    assert "float32" in captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--op lora", "argument --op: invalid choice: 'lora'"),
        ("--direction backward", "argument --direction: invalid choice: 'backward'"),
        ("--cases all", "argument --cases: invalid choice: 'all'"),
        ("--implementation tpu", "argument --implementation: invalid choice: 'tpu'"),
        ("--rows 0", "argument --rows: must be a positive integer, got '0'"),
        ("--in 1.5", "argument --in: must be a positive integer, got '1.5'"),
        ("--seconds -1", "argument --seconds: must be a number of seconds, got '-1'"),
        ("--seconds nan", "argument --seconds: must be a number of seconds, got 'nan'"),
        ("--in 4 --rank 8", "rank must be at most in_features and out_features, got rank 8"),
        ("--cases table --rows 3", "no case of the list matches"),
        ("--json no/such/folder/x.json", "argument --json: no folder no/such/folder"),
        ("--json .", "argument --json: . is a folder, needed a file"),
    ],
)
def test_bad_input(measured, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", *flags.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert measured == []


MISSING = {
    "xla": Implementation(True, "any", "always there"),
    "cuda": Implementation(False, "cuda", "do pip install this[cuda]"),
}


def test_a_missing_implementation_says_why(measured, monkeypatch, capsys):
    monkeypatch.setattr(cli, "implementations", lambda: MISSING)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["bench", "--implementation", "cuda"])
    assert exit_info.value.code == 2
    assert "argument --implementation: do pip install this[cuda]" in capsys.readouterr().err


def test_info(monkeypatch, capsys):
    monkeypatch.setattr(cli, "implementations", lambda: MISSING)
    assert cli.main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["jax", jax.__version__] in lines
    assert ["jax_fused_lora", jax_fused_lora.__version__] in lines
    assert ["xla", "any", "yes", "always", "there"] in lines
    assert ["cuda", "cuda", "no", "do", "pip", "install", "this[cuda]"] in lines
