"""The command line: `info` says what is installed, `bench` measures it."""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jax_fused_lora
from jax_fused_lora import bench, implementations
from jax_fused_lora.bench import Case, Ratio, Row

# A table that is piped into a file has no terminal to take its width from.
PIPED_WIDTH = 120
# What counts as slower than XLA, and not as noise.
SLOWER = 1.05
# What a shape given by hand has where a flag does not say.
SHAPE = {"rows": 1, "in_features": 2048, "rank": 8}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status.

    Args:
        argv: the arguments, by default those of the process.
    """
    arguments = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    return int(arguments.run(arguments, console))


def machine() -> dict[str, Any]:
    """What figures depend on: processor, versions, what native code there is; and the date."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "device": device.device_kind,
        "platform": device.platform,
        "jax_fused_lora": jax_fused_lora.__version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "python": platform.python_version(),
        "implementations": {
            name: dataclasses.asdict(one) for name, one in implementations().items()
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Writes all that was measured; whoever reads the file finds all of it or the old one."""
    report = {"machine": header, "rows": [dataclasses.asdict(row) for row in rows]}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _processor() -> str:
    """The processor's name, which Python's `platform` knows on few systems."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _info(_: argparse.Namespace, console: Console) -> int:
    header = machine()
    for name in ("jax_fused_lora", "jax", "jaxlib", "python"):
        console.print(f"{name:15} {header[name]}")
    table = Table(box=None, pad_edge=False)
    for title in ("implementation", "platform", "available"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for name, implementation in implementations().items():
        available = "yes" if implementation.available else "no"
        # A reason may have brackets, as in `pip install name[extra]`, which are rich's markup.
        table.add_row(name, implementation.platform, available, escape(implementation.reason))
    console.print()
    console.print(table)
    return 0


def _bench(arguments: argparse.Namespace, console: Console) -> int:
    try:
        cases = _cases(arguments)
    except ValueError as error:
        arguments.parser.error(str(error))
    if arguments.json and not arguments.json.parent.is_dir():
        arguments.parser.error(f"argument --json: no folder {arguments.json.parent}")
    wanted = arguments.implementation
    if wanted and not implementations()[wanted].available:
        arguments.parser.error(f"argument --implementation: {implementations()[wanted].reason}")
    header = machine()
    rows: list[Row] = []
    failures: list[str] = []
    progress = Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    with progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            try:
                if arguments.layers:
                    case = dataclasses.replace(case, chain=arguments.layers)
                rows.append(bench.measure(case, seconds=arguments.seconds, implementation=wanted))
            except KeyboardInterrupt:
                failures.append("interrupted: the cases that follow were not measured")
                break
            # One case that cannot run, such as a dtype that an implementation named by the user
            # does not take, must not cost the others.
            except (ValueError, TypeError, RuntimeError) as error:
                failures.append(f"{case}: {error}")
            progress.advance(task)
    _print_header(console, header)
    _print_rows(console, rows)
    if arguments.json:
        write_json(arguments.json, header, rows)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for: shapes given by hand, or those of a list that the flags let through."""
    wanted = {
        name: values
        for name in ("op", "rows", "in_features", "out_features", "rank", "dtype", "direction")
        if (values := getattr(arguments, name))
    }
    if arguments.cases is None and wanted.keys() & {*SHAPE, "out_features"}:
        shapes = {name: wanted.get(name, [value]) for name, value in SHAPE.items()}
        return [
            Case(op, m, k, n or k, rank, dtype, direction)
            for op, direction, dtype, m, k, n, rank in itertools.product(
                wanted.get("op", ["lora_linear"]),
                wanted.get("direction", ["forward"]),
                wanted.get("dtype", ["float32"]),
                shapes["rows"],
                shapes["in_features"],
                wanted.get("out_features", [0]),
                shapes["rank"],
            )
        ]
    cases = [
        case
        for case in bench.PRESETS[arguments.cases or "table"]()
        if all(getattr(case, name) in values for name, values in wanted.items())
    ]
    if not cases:
        raise ValueError("no case of the list matches")
    return cases


def _print_header(console: Console, header: dict[str, Any]) -> None:
    on = "" if header["platform"] == "cpu" else f", {header['device']}"
    console.print(f"{header['processor']}, {header['cores']} cores{on}, {header['date']}")
    console.print(
        f"jax_fused_lora {header['jax_fused_lora']}, jax {header['jax']}, "
        f"jaxlib {header['jaxlib']}, Python {header['python']}"
    )
    # Without native code ours is XLA too, and every ratio would be 1 for no visible reason.
    for name, one in header["implementations"].items():
        if one["platform"] == header["platform"] and (one["available"] or name == one["platform"]):
            console.print(
                f"{name}: {'' if one['available'] else 'missing, '}{escape(one['reason'])}"
            )
    console.print(
        "µs a layer: medians; ratios of these, in brackets the quartiles of each round's ratio"
    )


def _print_rows(console: Console, rows: list[Row]) -> None:
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


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jax_fused_lora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="versions, and which implementations can serve here")
    info.set_defaults(run=_info)

    measure = commands.add_parser(
        "bench",
        help="time layers against XLA",
        description=bench.__doc__,
        epilog="--rows, --in, --out and --rank measure shapes of your own, defaults as given; "
        "beside --cases they choose among the cases of that list, as other flags always do. A flag "
        "takes several values. All of the sweep takes hours.",
    )
    measure.set_defaults(run=_bench, parser=measure)
    add = measure.add_argument
    add("--cases", choices=tuple(bench.PRESETS), help="the list to measure (default: table)")
    add("--op", nargs="+", choices=bench.OPS)
    add("--rows", nargs="+", type=_positive, metavar="M", help="default 1")
    add("--in", nargs="+", type=_positive, metavar="K", dest="in_features", help="default 2048")
    add("--out", nargs="+", type=_positive, metavar="N", dest="out_features", help="default: --in")
    add("--rank", nargs="+", type=_positive, metavar="R", help="default 8")
    add("--dtype", nargs="+", choices=bench.DTYPES)
    add("--direction", nargs="+", choices=bench.DIRECTIONS)
    add(
        "--layers",
        type=_positive,
        metavar="L",
        help="layers in the chain; few of them stay in a cache (default: enough to move 64 MB)",
    )
    add("--seconds", type=_seconds, default=2.0, help="time to measure a case (default 2)")
    add(
        "--implementation",
        choices=tuple(implementations()),
        help="the one of ours to measure (default: what the library chooses)",
    )
    add("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    return parser
