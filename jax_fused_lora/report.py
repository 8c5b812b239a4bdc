"""What the command line prints: the machine, the bench's tables, the selftest's."""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_fused_lora import accuracy, selftest
from jax_fused_lora.bench import Ratio, Row
from jax_fused_lora.selftest import Check, Duel, Timing

# What counts as slower than XLA, and not as noise.
SLOWER = 1.05
# How many failures of an implementation are told: they tend to have one cause.
TOLD = 12


def print_machine(console: Console, header: dict[str, Any]) -> None:
    """What the figures and results that follow depend on, in two lines."""
    on = "" if header["platform"] == "cpu" else f", {header['device']}"
    console.print(f"{header['processor']}, {header['cores']} cores{on}, {header['date']}")
    console.print(
        f"jax_fused_lora {header['jax_fused_lora']}, jax {header['jax']}, "
        f"jaxlib {header['jaxlib']}, Python {header['python']}"
    )


def print_implementations(console: Console, header: dict[str, Any]) -> None:
    """Every implementation, with its reason."""
    table = Table(box=None, pad_edge=False)
    for title in ("implementation", "platform", "available"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for name, one in header["implementations"].items():
        # A reason may have brackets, as in `pip install name[extra]`, which are rich's markup.
        available = "yes" if one["available"] else "no"
        table.add_row(name, one["platform"], available, escape(one["reason"]))
    console.print(table)


# ---- The bench.


def print_bench_header(console: Console, header: dict[str, Any]) -> None:
    """The machine, the implementations that could serve it, and what the figures are."""
    print_machine(console, header)
    # Without native code ours is XLA too, and every ratio would be 1 for no visible reason.
    for name, one in header["implementations"].items():
        if one["platform"] == header["platform"] and (one["available"] or name == one["platform"]):
            console.print(
                f"{name}: {'' if one['available'] else 'missing, '}{escape(one['reason'])}"
            )
    console.print(
        "µs a layer: medians; ratios of these, in brackets the quartiles of each round's ratio"
    )


def print_rows(console: Console, rows: list[Row]) -> None:
    """What was measured, a table for each op and direction."""
    for (op, direction), group in itertools.groupby(
        rows, lambda row: (row.case.op, row.case.direction)
    ):
        console.print(f"\n[bold]{op}, {direction}[/]")
        console.print(_table(list(group)))
    slower = [row for row in rows if row.over_xla.medians > SLOWER]
    if rows:
        console.print(f"\nslower than XLA by more than 5%: {len(slower)} of {len(rows)}")


def _table(rows: list[Row]) -> Table:
    """A table of one op and direction; columns that would be empty are left out."""
    with_base = any(row.base_us is not None for row in rows)
    with_form = any(row.form for row in rows)
    table = Table(box=None, pad_edge=False)
    with_layers = len({row.case.chain for row in rows}) > 1
    titles = ["shape", "rank", "dtype"] + ["layers"] * with_layers + ["ours µs", "XLA µs"]
    titles += ["base µs"] * with_base + ["ours/XLA"] + ["ours/base"] * with_base + ["achieved"]
    for title in titles:
        left = title in ("shape", "dtype")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    if with_form:
        table.add_column("form", no_wrap=True)
    for row in rows:
        case = row.case
        cells = [case.shape, str(case.rank), case.dtype]
        if with_layers:
            cells.append(str(row.layers))
        cells += [_number(row.ours_us), _number(row.xla_us)]
        if with_base:
            cells.append(_number(row.base_us) if row.base_us is not None else "")
        cells.append(_ratio(row.over_xla))
        if with_base:
            cells.append(f"{row.over_base.medians:.2f}" if row.over_base is not None else "")
        compute = case.compute_bound
        cells.append(f"{row.gflop_per_s:.1f} GFLOP/s" if compute else f"{row.gb_per_s:.1f} GB/s")
        if with_form:
            cells.append(row.form)
        table.add_row(*cells, style="red" if row.over_xla.medians > SLOWER else None)
    return table


def _number(us: float) -> str:
    return f"{us:,.2f}" if us < 100 else f"{us:,.0f}"


def _ratio(ratio: Ratio) -> str:
    first, third = ratio.quartiles
    return f"{ratio.medians:.2f} ({first:.2f}–{third:.2f})"


# ---- The selftest.


def print_checks(console: Console, checks: Sequence[Check], header: dict[str, Any]) -> None:
    """How many cases of each implementation and dtype were right, and what was wrong."""
    console.print(
        f"\n[bold]accuracy[/]: y and every gradient of both ops, {len(selftest.SHAPES)} shapes, "
        "against float64;\nbeside it the largest error over what is allowed"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("implementation", *accuracy.DTYPES):
        table.add_column(title, no_wrap=True)
    groups = _grouped(checks, lambda each: each.implementation)
    for name, group in groups.items():
        by_dtype = _grouped(group, lambda each: each.dtype)
        cells = [_accuracy(by_dtype.get(dtype, [])) for dtype in accuracy.DTYPES]
        wrong = any(each.problem for each in group)
        table.add_row(name, *cells, style="red" if wrong else None)
    console.print(table)
    for name, one in header["implementations"].items():
        if one["available"] and name not in selftest.devices():
            console.print(f"{name}: not checked, JAX has no {one['platform']} device here")
    _print_problems(console, groups)


def print_timings(console: Console, timings: Sequence[Timing]) -> None:
    """Each native implementation against XLA."""
    console.print(
        "\n[bold]speed[/]: µs a layer, medians; ratios of these, in brackets the quartiles"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("implementation", "op", "direction", "shape", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("rank", "µs", "XLA µs", "/ XLA"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in timings:
        case, row = each.case, each.row
        cells = [each.implementation, case.op, case.direction, case.shape, case.dtype]
        cells += [str(case.rank)]
        if row is None:
            table.add_row(*cells, "", "", "failed", style="red")
        else:
            cells += [_number(row.ours_us), _number(row.xla_us), _ratio(row.over_xla)]
            table.add_row(*cells, style="red" if row.over_xla.medians > SLOWER else None)
    console.print(table)
    _print_problems(console, _grouped(timings, lambda each: each.implementation))


def print_duels(console: Console, duels: Sequence[Duel]) -> None:
    """From which row count on the challenger wins."""
    first = duels[0]
    case, names = first.case, (first.challenger, first.champion)
    console.print(
        f"\n[bold]{' against '.join(names)}[/]: {case.op} {case.in_features}→"
        f"{case.out_features} rank {case.rank}, µs a layer, medians"
    )
    by_dtype = _grouped(duels, lambda each: each.case.dtype)
    crossings = selftest.crossings(duels)
    table = Table(box=None, pad_edge=False)
    table.add_column("rows", justify="right", no_wrap=True)
    for dtype in by_dtype:
        for title in (f"{dtype}: {names[0]}", names[1], "ratio"):
            table.add_column(title, justify="right", no_wrap=True)
    for rows, group in _grouped(duels, lambda each: each.case.rows).items():
        found = {each.case.dtype: each for each in group}
        cells = [cell for dtype in by_dtype for cell in _duel(found.get(dtype))]
        table.add_row(str(rows), *cells)
    console.print(table)
    for dtype, group in by_dtype.items():
        least = crossings[dtype]
        if least is None:
            most = max(each.case.rows for each in group)
            console.print(f"{dtype}: {names[0]} does not win at {most} rows, the most measured")
        else:
            work = next(each.case.flops // 2 for each in group if each.case.rows == least)
            console.print(
                f"{dtype}: {names[0]} wins from {least} rows on, {work:.1e} multiplications"
            )
    _print_problems(console, {" against ".join(names): list(duels)})


def print_metal_variable(console: Console) -> None:
    """Who chooses Metal, and when."""
    console.print(
        "JAX_FUSED_LORA_METAL=auto|always|never says when a call without implementation= runs on "
        "Metal:\nabove a threshold of work (auto, the default), always, or never. Here it is "
        f"{escape(os.environ.get('JAX_FUSED_LORA_METAL', 'not set'))}."
    )


def _accuracy(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    failed = [each for each in checks if each.problem]
    numbers = [each.worst for each in failed or checks if each.worst is not None]
    verdict = f"{len(failed)} of {len(checks)} failed" if failed else "ok"
    return f"{verdict}, {max(numbers):.2g}" if numbers else verdict


def _duel(duel: Duel | None) -> list[str]:
    if duel is None or duel.challenger_us is None or duel.champion_us is None:
        return ["", "", "" if duel is None else "failed"]
    return [_number(duel.challenger_us), _number(duel.champion_us), f"{duel.ratio:.2f}"]


T = TypeVar("T", Check, Timing, Duel)


def _grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by key, keys in the order in which they first appear."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _print_problems(console: Console, groups: dict[Any, list[T]]) -> None:
    for name, group in groups.items():
        wrong = [each for each in group if each.problem]
        for each in wrong[:TOLD]:
            console.print(escape(f"{each}: {' '.join(each.problem.split())}"))
        if len(wrong) > TOLD:
            console.print(f"{name}: and {len(wrong) - TOLD} more, which --json writes")
