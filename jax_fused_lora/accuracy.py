"""The float64 truth of the ops, and how far from it a result may lie.

The truth is `reference.forward` in float64 and JAX's own derivative of it, so a mistake in the
hand-written backward pass cannot hide in the oracle.

A result is right when it is the truth with float32 sums and one rounding to its own dtype:

    |result - truth| ≤ SUMS · bound + ROUNDING[dtype] · |truth| + TINY[dtype]

`bound` is the same formula on absolute values, which is what the rounding errors of a sum of
products are proportional to, whatever the order. SUMS = 1e-5 is what the project asks of float32;
sums of a few thousand products stay well below it. ROUNDING is half a unit in the last place:
a second rounding on the way, to h or to x·W say, breaks it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fused_lora import reference

NAMES = ("x", "lora_a", "lora_b", "kernel", "bias")
SUMS = 1e-5
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
TINY = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24, "float64": 0.0}

DTYPES = ("float32", "bfloat16", "float16")

Operands = dict[str, jax.Array]
Expected = tuple[np.ndarray, np.ndarray]  # the truth and its bound


def operands(
    rows: Sequence[int],
    k: int,
    n: int,
    r: int,
    dtype: str,
    *,
    kernel: bool = True,
    bias: bool = True,
    seed: int = 0,
) -> Operands:
    """Random operands by name; `rows` are x's leading axes. Entries are rounded to dtype."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (*rows, k), "lora_a": (k, r), "lora_b": (r, n)}
    if kernel:
        shapes["kernel"] = (k, n)
    if bias:
        shapes["bias"] = (n,)
    # jnp.asarray would compile a program for every shape.
    return {
        name: jax.device_put(rng.normal(size=shape).astype(jnp.dtype(dtype)))
        for name, shape in shapes.items()
    }


def truth(given: Mapping[str, Any], g: Any, scaling: float) -> dict[str, Expected]:
    """(truth, bound) in float64 of "y" and of the gradient of each operand and of the scaling.

    Args:
        given: the operands by name, kernel and bias only where there are any.
        g: `(..., out_features)`, the cotangent of y.
        scaling: a number.
    """

    def both(transform: Callable[[Any], Any]) -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            values, cotangent, s = jax.tree.map(
                lambda value: transform(np.asarray(value, np.float64)),
                (dict(given), g, scaling),
            )
            everything = _everything(values, cotangent, s)
            assert everything["y"].dtype == jnp.float64
            return {name: np.asarray(value) for name, value in everything.items()}

    exact, bound = both(lambda v: v), both(np.abs)
    return {name: (exact[name], bound[name]) for name in exact}


@jax.jit  # as one program: the same operations one by one are as many programs for every shape
def _everything(given: Operands, g: jax.Array, scaling: jax.Array) -> Operands:
    """`truth` of operands as they are, in their own dtype."""

    def forward(given: Operands, scaling: jax.Array) -> jax.Array:
        return reference.forward(
            given["x"],
            given["lora_a"],
            given["lora_b"],
            given.get("kernel"),
            given.get("bias"),
            scaling=scaling,
        )[0]

    y, vjp = jax.vjp(forward, given, scaling)
    grads, d_scaling = vjp(g)
    return {"y": y, **grads, "scaling": d_scaling}


class Verdict(NamedTuple):
    """How a result compares with the truth.

    Attributes:
        worst: the largest error over what is allowed, 1 at most where all is right; infinite
            where the result is not finite or not comparable.
        problem: what is wrong, as the rest of a sentence that begins with the result's name; "" if
            nothing is.
    """

    worst: float
    problem: str


def judge(result: Any, expected: Expected, dtype: str, *, terms: bool = False) -> Verdict:
    """Whether `result` is `expected` as closely as its dtype can hold.

    `terms` allows each of two terms, and their sum, a rounding of its own: what JAX's derivative
    of the definition does to the gradient of x, which is used twice. The native backward pass
    needs no such leave.
    """
    exact, bound = expected
    if result.dtype != dtype:
        return Verdict(math.inf, f"is {result.dtype}, needed {dtype}")
    if result.shape != exact.shape:
        return Verdict(math.inf, f"has shape {result.shape}, needed {exact.shape}")
    error = np.abs(np.asarray(result, np.float64) - exact)
    rounded = 2 * bound if terms else np.abs(exact)
    allowed = SUMS * bound + ROUNDING[dtype] * rounded + TINY[dtype]
    wrong = ~(error <= allowed)  # a NaN is wrong
    with np.errstate(divide="ignore"):  # where nothing is allowed, an error is infinitely too much
        excess = np.divide(error, allowed, out=np.zeros_like(error), where=error != 0)
    excess[np.isnan(excess)] = np.inf
    worst = float(excess.max(initial=0))
    if not wrong.any():
        return Verdict(worst, "")
    where = tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
    return Verdict(
        worst,
        f"has {wrong.sum()} of {wrong.size} entries off; worst at {where}, "
        f"{worst:.3g} times what is allowed",
    )
