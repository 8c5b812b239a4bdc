"""Times chained LoRA layers: ours, the same mathematics in jitted XLA, the base product alone.

A single call of a jitted program costs microseconds whatever it does, and a layer timed on the
same weights again and again runs from the cache. So every side of a comparison is one program that
applies many layers with different weights, the output of one being the input of the next. The
sides take turns, in every order, so that a change of the machine's speed meets them all alike; what
is reported is the median.
"""

import ctypes
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fused_lora
from jax_fused_lora import forms
from jax_fused_lora.cases import Case
from jax_fused_lora.implementations import available_on, default_platform, load

# How far our result may be from XLA's, as a norm relative to XLA's: more than the roundings of a
# long chain add up to, less than the low-rank part of a short one.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
SCALING = 2.0
MIN_ROUNDS = 7
# Untimed calls at the beginning of a side's turn, and how long they may take in all.
SETTLE_CALLS, SETTLE_SECONDS = 4, 0.05
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
GPU_SECONDS = 0.03  # of calls that are timed together


class WrongResult(RuntimeError):
    """The sides of a comparison did not compute the same thing, so their times mean nothing."""


@dataclass(frozen=True)
class Ratio:
    """How two sides compare; below 1, ours is the faster.

    Attributes:
        medians: the ratio of the two medians, which is the figure to quote.
        pairs: the median of the ratios within each round.
        quartiles: the first and third quartile of those.
    """

    medians: float
    pairs: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """What was measured for a case. Times are medians, in microseconds a layer.

    Attributes:
        form: the way `lora_linear` and `lora_forward` took (see `route`).
        layers: layers with weights of their own in the chain.
        rounds: how often each side was timed.
        gb_per_s: bytes of operands and results by our time.
        gflop_per_s: arithmetic by our time.
        error: the largest relative difference (of norms) between our results and XLA's.
    """

    case: Case
    form: str
    layers: int
    rounds: int
    ours_us: float
    xla_us: float
    base_us: float | None
    over_xla: Ratio
    over_base: Ratio | None
    gb_per_s: float
    gflop_per_s: float
    error: float


def route(case: Case, implementation: str | None = None) -> str:
    """The library and forms that serve a case on this platform, "" without native code."""
    problem = forms.Problem(
        *(case.rows, case.in_features, case.out_features, case.rank, case.dtype),
        has_kernel=case.has_kernel,
    )
    available = available_on(default_platform())
    library = implementation or forms.best_library(available, problem)
    if library is None or library == "xla":
        return ""
    options = {"product": load(library).product, "named": implementation is not None}
    chosen = [forms.forward_form(library, problem, **options)]
    if case.backward:
        chosen.append(forms.backward_form(library, problem, **options))
    named = " / ".join(chosen)
    return named if library == available[0] else f"{library}: {named}"


def measure(case: Case, *, seconds: float = 2.0, implementation: str | None = None) -> Row:
    """Times one case.

    Args:
        case: what to measure.
        seconds: how long to go on; at least seven rounds are made, however long they take.
        implementation: passed on to our op.

    Returns:
        The medians and how they compare.

    Raises:
        WrongResult: if a result is not finite or ours differs from XLA's.
    """
    sides = sides_of(case, implementation)
    # Roundings add up from pass to pass, so it is one that is checked.
    error = _check(case, sides if case.passes == 1 else sides_of(case, implementation, passes=1))
    per_layer = microseconds(case, interleave(sides, seconds))
    medians = {name: float(np.median(times)) for name, times in per_layer.items()}
    ours = medians["ours"]
    return Row(
        case=case,
        form=route(case, implementation),
        layers=case.layers,
        rounds=len(per_layer["ours"]),
        ours_us=ours,
        xla_us=medians["xla"],
        base_us=medians.get("base"),
        over_xla=_ratio(per_layer["ours"], per_layer["xla"]),
        over_base=_ratio(per_layer["ours"], per_layer["base"]) if "base" in per_layer else None,
        gb_per_s=case.moved_bytes / ours / 1e3,
        gflop_per_s=case.flops / ours / 1e3,
        error=error,
    )


def microseconds(case: Case, times: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `interleave` measured of a case's sides, in microseconds a layer."""
    return {name: 1e6 / (case.layers * case.passes) * each for name, each in times.items()}


def keep_freed_memory() -> None:
    """Has the C library keep what this process frees: for the rest of the process, glibc only.

    A program takes its temporaries and results from `malloc` at every call. glibc hands large ones
    back to the system when they are freed (always from 32 MB on, smaller ones if they lie last),
    and the next call pays for each page again. That is a matter of how many buffers a chain has,
    not of its layers: XLA's chain of `x @ a @ b` writes a layer's result over its input, ours into
    a second buffer. 8 of 2048×2048 in float32 took 1.37 of XLA's time on an Intel server, 0.76 with
    the pages kept.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


Weights = tuple[jax.Array, ...]
Layer = Callable[[jax.Array, Weights, Weights], jax.Array]
Side = Callable[[], Any]


def sides_of(
    case: Case, implementation: str | None = None, *, passes: int | None = None
) -> dict[str, Side]:
    """The compiled programs, each with its arguments; all of them use the same weights.

    Args:
        case: what each program computes.
        implementation: passed on to our op.
        passes: through the chain, in place of `case.passes`.
    """

    def ours(x: jax.Array, frozen: Weights, trained: Weights) -> jax.Array:
        op: Callable[..., jax.Array] = getattr(jax_fused_lora, case.op)
        return op(x, *frozen, *trained, scaling=SCALING, implementation=implementation)

    # What someone would write without this library; XLA is free to fuse it as it can.
    def xla(x: jax.Array, frozen: Weights, trained: Weights) -> jax.Array:
        a, b = trained
        delta = SCALING * ((x @ a) @ b)
        return x @ frozen[0] + delta if frozen else delta

    def base(x: jax.Array, frozen: Weights, trained: Weights) -> jax.Array:
        return x @ frozen[0]

    x, frozen, trained, cotangent = _arguments(case)
    sides: dict[str, tuple[Layer, list[Weights]]] = {"ours": (ours, trained), "xla": (xla, trained)}
    if case.has_kernel:
        sides["base"] = (base, [()] * case.layers)
    passes = case.passes if passes is None else passes
    return {
        name: partial(_program(layer, case, passes), x, frozen, weights, cotangent)
        for name, (layer, weights) in sides.items()
    }


def _program(layer: Layer, case: Case, passes: int) -> Callable[..., Any]:
    """The jitted chain; weights are arguments, so that XLA cannot compute with them beforehand."""

    def forward(x: jax.Array, frozen: list[Weights], trained: list[Weights]) -> jax.Array:
        for fixed, learnt in zip(frozen, trained, strict=True):
            x = layer(x, fixed, learnt)
        return x

    def run(
        x: jax.Array, frozen: list[Weights], trained: list[Weights], cotangent: jax.Array
    ) -> Any:
        def once(_: int, carry: Any) -> Any:
            x, gradients = carry
            if not case.backward:
                return forward(x, frozen, trained), gradients
            y, pull = jax.vjp(lambda x, trained: forward(x, frozen, trained), x, trained)
            return y, pull(cotangent)

        # y is returned because its last product would be dropped as unused without it.
        carry = x, (x, trained) if case.backward else ()
        return once(0, carry) if passes == 1 else jax.lax.fori_loop(0, passes, once, carry)

    return jax.jit(run)


def _arguments(case: Case) -> tuple[jax.Array, list[Weights], list[Weights], jax.Array]:
    """Random x, frozen and trained weights of each layer, and the gradient of the result.

    The numbers keep their size along the chain: W does by its scale. The low-rank part alone would
    drift out of float16's range, so there A has orthonormal columns, and B those of the next A.
    """
    keys = itertools.count()

    def normal(*shape: int) -> Any:  # made where it is needed: a host takes seconds for a gigabyte
        return jax.random.normal(jax.random.key(next(keys)), shape, np.float32)

    def array(values: Any) -> jax.Array:
        return jnp.asarray(values, case.dtype)

    rank, widths = case.rank, (case.in_features, case.out_features)
    frozen: list[Weights] = []
    trained: list[Weights] = []
    if case.has_kernel:
        for i in range(case.layers):
            k, n = widths[i % 2], widths[(i + 1) % 2]
            frozen.append((array(normal(k, n) / np.sqrt(k)),))
            # An eighth of the size of x·W: enough to be missed, too little to make y grow.
            b = normal(rank, n) / (8 * SCALING * np.sqrt(rank))
            trained.append((array(normal(k, rank) / np.sqrt(k)), array(b)))
    else:
        bases = [np.linalg.qr(normal(widths[i % 2], rank))[0] for i in range(case.layers)]
        for a, following in zip(bases, bases[1:] + bases[:1], strict=True):
            frozen.append(())
            trained.append((array(a), array(following.T / SCALING)))
    x, cotangent = (array(normal(case.rows, case.in_features)) for _ in range(2))
    return x, frozen, trained, cotangent


def _check(case: Case, sides: dict[str, Side]) -> float:
    """Runs every side once; returns how far our results are from XLA's, relative to these."""
    results = {
        name: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(side())]
        for name, side in sides.items()
    }
    for name, leaves in results.items():
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise WrongResult(f"{case}: a result of {name} is not finite")
    error = max(
        float(np.linalg.norm(ours - xla) / np.linalg.norm(xla))
        for ours, xla in zip(results["ours"], results["xla"], strict=True)
    )
    # Written so that a NaN, from a result that is all zeros, fails as well.
    if not error <= TOLERANCES[case.dtype]:
        raise WrongResult(
            f"{case}: our result differs from XLA's by {error:.2g} (relative), "
            f"more than {TOLERANCES[case.dtype]:g}"
        )
    return error


def interleave(sides: dict[str, Side], seconds: float) -> dict[str, np.ndarray]:
    """Times the sides in turn until the time is up; returns the seconds of each call.

    A turn is some calls of which the last is timed: the first find the caches as another side left
    them (XLA's widened copies of bfloat16 weights, say), which no program that repeats itself does.
    A third-level cache that is filled by what the second evicts takes some calls to turn over:
    after XLA's, ours of a bfloat16 1×2048→2048 layer took 986, 784, 755, 638, 567, 530 µs on Zen 3.

    On a GPU several calls are timed together, each handed over while the one before runs, as a
    training loop does it. One at a time, the host's 7 to 10 µs a layer (see `Case.passes`) are
    added to what the GPU takes, 24 for 512 rows of 4096→4096 in bfloat16.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    together = dict.fromkeys(sides, 1)
    if default_platform() != "cpu":
        for name, side in sides.items():
            _timed(side, 1)
            together[name] = int(GPU_SECONDS / _timed(side, 1)) + 1
    end = time.perf_counter() + seconds
    for rounds, order in enumerate(itertools.cycle(itertools.permutations(sides))):
        if rounds >= MIN_ROUNDS and time.perf_counter() >= end:
            break
        for name in order:
            turn = time.perf_counter()
            for _ in range(SETTLE_CALLS):
                jax.block_until_ready(sides[name]())
                if time.perf_counter() - turn > SETTLE_SECONDS:
                    break
            times[name].append(_timed(sides[name], together[name]))
    return {name: np.array(series) for name, series in times.items()}


def _timed(side: Side, calls: int) -> float:
    """The seconds of one of several calls in a row."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        side()
    jax.block_until_ready(side())
    return (time.perf_counter() - start) / calls


def _ratio(ours: np.ndarray, other: np.ndarray) -> Ratio:
    first, middle, third = (float(q) for q in np.percentile(ours / other, (25, 50, 75)))
    return Ratio(float(np.median(ours) / np.median(other)), middle, (first, third))
