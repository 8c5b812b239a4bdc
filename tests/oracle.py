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

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_fused_lora import reference

NAMES = ("x", "lora_a", "lora_b", "kernel", "bias")
SUMS = 1e-5
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
TINY = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24, "float64": 0.0}

DTYPES = ("float32", "bfloat16", "float16")


def operands(
    rows: Sequence[int], k: int, n: int, r: int, dtype: str, *, kernel=True, bias=True, seed=0
) -> dict[str, jax.Array]:
    """Random operands by name; `rows` are x's leading axes. Entries are rounded to dtype."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (*rows, k), "lora_a": (k, r), "lora_b": (r, n)}
    if kernel:
        shapes["kernel"] = (k, n)
    if bias:
        shapes["bias"] = (n,)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def truth(given: dict[str, jax.Array], g, scaling: float) -> dict[str, tuple]:
    """(truth, bound) in float64 of "y" and of the gradient of each operand and of the scaling."""

    def both(transform):
        with jax.enable_x64(True):
            values = {name: transform(np.asarray(v, np.float64)) for name, v in given.items()}
            s = transform(np.float64(scaling))

            def forward(values, s):
                return reference.forward(
                    *(values[n] for n in NAMES[:3]),
                    values.get("kernel"),
                    values.get("bias"),
                    scaling=s,
                )[0]

            y, vjp = jax.vjp(forward, jax.tree.map(jnp.asarray, values), jnp.asarray(s))
            grads, d_scaling = vjp(jnp.asarray(transform(np.asarray(g, np.float64))))
            assert y.dtype == jnp.float64
            everything = {"y": y, **grads, "scaling": d_scaling}
            return {name: np.asarray(value) for name, value in everything.items()}

    exact, bound = both(lambda v: v), both(np.abs)
    return {name: (exact[name], bound[name]) for name in exact}


def check(name: str, result: jax.Array, expected: tuple, dtype: str, *, terms=False) -> None:
    """Asserts that `result` is `expected` as closely as its dtype can hold.

    `terms` allows each of two terms, and their sum, a rounding of its own: what JAX's derivative
    of the definition does to the gradient of x, which is used twice. The native backward pass
    needs no such leave.
    """
    exact, bound = expected
    assert result.dtype == dtype, f"{name} is {result.dtype}"
    assert result.shape == exact.shape, f"{name} has shape {result.shape}"
    error = np.abs(np.asarray(result, np.float64) - exact)
    rounded = 2 * bound if terms else np.abs(exact)
    allowed = SUMS * bound + ROUNDING[dtype] * rounded + TINY[dtype]
    wrong = ~(error <= allowed)  # a NaN is wrong
    assert not wrong.any(), (
        f"{name}: {wrong.sum()} of {wrong.size} entries off; worst at "
        f"{np.unravel_index(np.nanargmax(error / allowed), error.shape)}, "
        f"{np.nanmax(error / allowed):.3g} times what is allowed"
    )
