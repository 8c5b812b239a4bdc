"""Checks every implementation that serves this machine against float64, and times it against XLA.

It is for machines that the project's own tests do not reach: what it finds is a report that its
user can send. So nothing that goes wrong in one case costs the others, and all the work is a list
of short steps with names: where one ends the process, the progress bar still shows which.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

import jax_fused_lora
from jax_fused_lora import accuracy, bench
from jax_fused_lora.cases import OPS, Case
from jax_fused_lora.implementations import implementations

# Rows, in, out, rank: no rows at all, single numbers, powers of two, sizes that divide nothing,
# both sides of the sizes at which kernels change (4, 8, 16 and 64 rows; ranks 16, 64 and 128).
SHAPES = (
    (0, 5, 7, 3),
    (1, 1, 1, 1),
    (1, 2048, 1000, 8),
    (3, 60, 77, 5),
    (5, 513, 65, 7),
    (16, 256, 256, 16),
    (33, 100, 130, 12),
    (64, 384, 96, 64),
    (65, 512, 64, 128),
    (100, 1025, 67, 17),
    (40, 300, 90, 200),
    (257, 129, 190, 20),
    (512, 256, 384, 32),
)
SCALING = -0.75
# A race between threads shows itself in some runs only, and a result may outlive the next call.
REPEATS = 3

# Chains as long as bench's own would take most of their time to compile.
TIMED = (
    Case("lora_linear", 1, 2048, 2048, 8, "float32", chain=8),
    Case("lora_linear", 1, 2048, 2048, 8, "bfloat16", chain=8),
    Case("lora_linear", 16, 1024, 1024, 16, "float32", chain=8),
    Case("lora_linear", 16, 1024, 1024, 16, "float16", chain=8),
    Case("lora_linear", 512, 1024, 1024, 16, "float32", "forward+backward", chain=2),
    Case("lora_linear", 512, 1024, 1024, 16, "bfloat16", "forward+backward", chain=2),
    Case("lora_forward", 512, 2048, 2048, 16, "float32", chain=8),
)
SECONDS = 0.4

# Who may win from some row count on, and against whom.
CONTESTANTS = ("metal", "cpu")
LAYER = Case("lora_linear", 1, 2048, 2048, 16)
LAYER_DTYPES = ("float32", "bfloat16")
ROWS = tuple(2**i for i in range(13))


@dataclass(frozen=True)
class Check:
    """One shape computed by one implementation.

    Attributes:
        shape: rows, in_features, out_features, rank.
        worst: the largest error over what is allowed, of y and all gradients; None if something
            was not finite or nothing was computed.
        problem: what was wrong, "" if nothing.
    """

    implementation: str
    op: str
    shape: tuple[int, int, int, int]
    dtype: str
    worst: float | None
    problem: str = ""

    def __str__(self) -> str:
        rows, k, n, rank = self.shape
        return f"{self.implementation}: {self.op} {rows}×{k}→{n} rank {rank} {self.dtype}"


@dataclass(frozen=True)
class Timing:
    """One case of the bench, ours being `implementation`; `row` is None where `problem` is not."""

    implementation: str
    case: Case
    row: bench.Row | None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}: {self.case}"


@dataclass(frozen=True)
class Duel:
    """Two implementations of one layer in turns: medians in microseconds, None if one failed."""

    challenger: str
    champion: str
    case: Case
    challenger_us: float | None = None
    champion_us: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.challenger} against {self.champion}: {self.case}"

    @property
    def ratio(self) -> float:
        """The challenger's time over the champion's; NaN if one failed."""
        if self.challenger_us is None or self.champion_us is None:
            return math.nan
        return self.challenger_us / self.champion_us


Result = Check | Timing | Duel


class Step(NamedTuple):
    """A piece of the work: its name, and what does it."""

    title: str
    run: Callable[[], Result]


def plan(*, quick: bool = False) -> list[Step]:
    """All that is to be done on this machine; `quick` leaves out whatever is timed."""
    found = devices()
    blank: list[Result] = [
        Check(name, op, shape, dtype, None)
        for op in OPS
        for dtype in accuracy.DTYPES
        for shape in SHAPES
        for name in found
    ]
    if not quick:
        blank += [Timing(name, case, None) for name in found if name != "xla" for case in TIMED]
        challenger, champion = CONTESTANTS
        if challenger in found:
            blank += [
                Duel(
                    challenger,
                    champion if champion in found else "xla",
                    # Enough weights that a cache does not hold them, where reading them counts.
                    replace(LAYER, rows=rows, dtype=dtype, chain=4 if rows <= 256 else 2),
                )
                for dtype in LAYER_DTYPES
                for rows in ROWS
            ]
    return [Step(str(each), partial(fill, each, found[_subject(each)])) for each in blank]


def devices() -> dict[str, jax.Device]:
    """The device on which each available implementation runs; those without one are left out."""
    found = {}
    for name, each in implementations().items():
        if each.available:
            with contextlib.suppress(RuntimeError):  # which JAX raises for an unknown platform
                found[name] = jax.devices(None if each.platform == "any" else each.platform)[0]
    return found


def fill(blank: Result, device: jax.Device) -> Result:
    """Does what a blank result stands for; whatever is raised becomes its problem."""
    try:
        with jax.default_device(device):
            if isinstance(blank, Check):
                return check(blank)
            return time_case(blank) if isinstance(blank, Timing) else fight(blank)
    except Exception as error:
        # A compiler's message may fill pages; its beginning says what.
        return replace(blank, problem=f"raised {type(error).__name__}: {str(error)[:500]}")


def check(blank: Check) -> Check:
    """Compares y and the gradient of every operand with the truth."""
    operands, g, expected = _task(blank.op, blank.shape, blank.dtype)
    op = getattr(jax_fused_lora, blank.op)

    @jax.jit
    def run(operands: accuracy.Operands, g: jax.Array) -> Any:
        y, vjp = jax.vjp(
            lambda o: op(**o, scaling=SCALING, implementation=blank.implementation), operands
        )
        return y, vjp(g)[0]

    worst, problem = 0.0, ""
    for y, grads in [run(operands, g) for _ in range(REPEATS)]:
        for name, result in {"y": y, **{f"gradient of {n}": d for n, d in grads.items()}}.items():
            verdict = accuracy.judge(
                result,
                expected[name.removeprefix("gradient of ")],
                blank.dtype,
                terms=name == "gradient of x" and blank.implementation == "xla",
            )
            if verdict.problem and (not problem or verdict.worst > worst):
                problem = f"{name} {verdict.problem}"
            worst = max(worst, verdict.worst)
    return replace(blank, worst=worst if math.isfinite(worst) else None, problem=problem)


def time_case(blank: Timing) -> Timing:
    """Measures the case as the bench does."""
    row = bench.measure(blank.case, seconds=SECONDS, implementation=blank.implementation)
    return replace(blank, row=row)


def medians(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Times implementations of a layer in turns: the median of each in microseconds a layer."""
    sides = {name: bench.sides_of(case, name)["ours"] for name in names}
    times = bench.microseconds(case, bench.interleave(sides, 0.0))
    return {name: float(np.median(times[name])) for name in names}


def fight(
    blank: Duel, timer: Callable[[Case, Sequence[str]], Mapping[str, float]] = medians
) -> Duel:
    """Times both of a duel."""
    times = timer(blank.case, (blank.challenger, blank.champion))
    return replace(blank, challenger_us=times[blank.challenger], champion_us=times[blank.champion])


def crossing(duels: Iterable[Duel]) -> int | None:
    """The least row count from which the challenger wins, there and at every greater one.

    Every power of two is measured and none searched for: one noisy figure would lead a search
    astray, and what is won far from the crossing is worth knowing too.
    """
    least = None
    for duel in sorted(duels, key=lambda duel: duel.case.rows, reverse=True):
        if not duel.ratio < 1:
            break
        least = duel.case.rows
    return least


def crossings(duels: Sequence[Duel]) -> dict[str, int | None]:
    """The crossing of each dtype."""
    dtypes = dict.fromkeys(duel.case.dtype for duel in duels)
    return {dtype: crossing(duel for duel in duels if duel.case.dtype == dtype) for dtype in dtypes}


def _subject(blank: Result) -> str:
    return blank.challenger if isinstance(blank, Duel) else blank.implementation


@functools.lru_cache(maxsize=1)  # the steps that follow are other implementations of the same
def _task(
    op: str, shape: tuple[int, int, int, int], dtype: str
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, accuracy.Expected]]:
    """Operands, the cotangent of y and what is to come of them; no array is on a device yet.

    The CPU computes the truth, wherever there is one: some devices have no float64.
    """
    rows, k, n, rank = shape
    linear = op == "lora_linear"
    try:
        host = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        host = None
    with jax.default_device(host):
        operands = accuracy.operands((rows,), k, n, rank, dtype, kernel=linear, bias=linear)
        g = accuracy.operands((rows,), n, 1, 1, dtype, seed=1)["x"]
        expected = accuracy.truth(operands, g, SCALING)
    return {name: np.asarray(o) for name, o in operands.items()}, np.asarray(g), expected
