"""The command line: `info` says what is installed, `bench` measures it, `selftest` checks it."""

import argparse
import dataclasses
import faulthandler
import itertools
import json
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jax_fused_lora
from jax_fused_lora import bench, implementations, report, selftest
from jax_fused_lora.bench import Row
from jax_fused_lora.cases import DIRECTIONS, DTYPES, OPS, PRESETS, Case
from jax_fused_lora.implementations import default_platform, usable_cores
from jax_fused_lora.selftest import Check, Duel, Result, Timing

# A table that is piped into a file has no terminal to take its width from.
PIPED_WIDTH = 120
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
        "cores": usable_cores(),
        "device": device.device_kind,
        "platform": default_platform(),
        "jax_fused_lora": jax_fused_lora.__version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "implementations": {
            name: dataclasses.asdict(one) for name, one in implementations().items()
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, header: dict[str, Any], rows: Iterable[Row]) -> None:
    """Writes all that was measured; whoever reads the file finds all of it or the old one."""
    _write_json(path, {"machine": header, "rows": [dataclasses.asdict(row) for row in rows]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
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
    console.print()
    report.print_implementations(console, header)
    return 0


def _bench(arguments: argparse.Namespace, console: Console) -> int:
    try:
        cases = _cases(arguments)
    except ValueError as error:
        arguments.parser.error(str(error))
    _check_folder(arguments)
    wanted = arguments.implementation
    if wanted and not implementations()[wanted].available:
        arguments.parser.error(f"argument --implementation: {implementations()[wanted].reason}")
    bench.keep_freed_memory()
    header = machine()
    rows: list[Row] = []
    failures: list[str] = []
    with _progress() as progress:
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
    report.print_bench_header(console, header)
    report.print_rows(console, rows)
    if arguments.json:
        write_json(arguments.json, header, rows)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _progress() -> Progress:
    return Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


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
        for case in PRESETS[arguments.cases or "table"]()
        if all(getattr(case, name) in values for name, values in wanted.items())
    ]
    if not cases:
        raise ValueError("no case of the list matches")
    return cases


def _selftest(arguments: argparse.Namespace, console: Console) -> int:
    _check_folder(arguments)
    # Native code that was never run on this kind of machine may end the process: then the machine
    # is printed already, the bar still names the step, and Python says where it was.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    # Tables cut to a narrow terminal would be cut in the issue as well.
    console.width = max(console.width, PIPED_WIDTH)
    header = machine()
    report.print_machine(console, header)
    console.print(header["system"] + "\n")
    report.print_implementations(console, header)
    console.file.flush()
    steps = selftest.plan(quick=arguments.quick)
    results: list[Result] = []
    with _progress() as progress:
        task = progress.add_task("", total=len(steps))
        try:
            for step in steps:
                progress.update(task, description=step.title, refresh=True)
                results.append(step.run())
                progress.advance(task)
        except KeyboardInterrupt:
            pass  # what is there is printed all the same
    checks = [result for result in results if isinstance(result, Check)]
    timings = [result for result in results if isinstance(result, Timing)]
    duels = [result for result in results if isinstance(result, Duel)]
    report.print_checks(console, checks, header)
    if timings:
        report.print_timings(console, timings)
    if duels:
        report.print_duels(console, duels)
    if header["implementations"]["metal"]["available"]:
        report.print_metal_variable(console)
    if arguments.json:
        content = {"machine": header, "steps": len(steps), "crossings": selftest.crossings(duels)}
        for name, some in (("checks", checks), ("timings", timings), ("duels", duels)):
            content[name] = [dataclasses.asdict(result) for result in some]
        _write_json(arguments.json, content)
    failed = sum(bool(result.problem) for result in results)
    missing = len(steps) - len(results)
    console.print(
        f"\n{len(results) - failed} of {len(steps)} steps passed, {failed} failed"
        + (f"; interrupted, {missing} were not run" if missing else "")
    )
    console.print("Paste this report into an issue of the project (as code, between lines of ```).")
    return 1 if failed or missing else 0


def _check_folder(arguments: argparse.Namespace) -> None:
    if arguments.json and not arguments.json.parent.is_dir():
        arguments.parser.error(f"argument --json: no folder {arguments.json.parent}")
    if arguments.json and arguments.json.is_dir():
        arguments.parser.error(f"argument --json: {arguments.json} is a folder, needed a file")


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

    check = commands.add_parser(
        "selftest",
        help="check and time every implementation here; prints a report for an issue",
        description=selftest.__doc__,
    )
    check.set_defaults(run=_selftest, parser=check)
    check.add_argument("--quick", action="store_true", help="check only, time nothing")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")

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
    add("--cases", choices=tuple(PRESETS), help="the list to measure (default: table)")
    add("--op", nargs="+", choices=OPS)
    add("--rows", nargs="+", type=_positive, metavar="M", help="default 1")
    add("--in", nargs="+", type=_positive, metavar="K", dest="in_features", help="default 2048")
    add("--out", nargs="+", type=_positive, metavar="N", dest="out_features", help="default: --in")
    add("--rank", nargs="+", type=_positive, metavar="R", help="default 8")
    add("--dtype", nargs="+", choices=DTYPES)
    add("--direction", nargs="+", choices=DIRECTIONS)
    add(
        "--layers",
        type=_positive,
        metavar="L",
        help="layers in the chain; few of them stay in a cache (default: 64 MB of them; GPU: 64)",
    )
    add("--seconds", type=_seconds, default=2.0, help="time to measure a case (default 2)")
    add(
        "--implementation",
        choices=tuple(implementations()),
        help="the one of ours to measure (default: what the library chooses)",
    )
    add("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    return parser
