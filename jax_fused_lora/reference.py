"""The definition of the two calls in `jax.numpy`, forward and backward.

Every implementation equals these functions, values and gradients. They are also what runs where
no native code serves, and what `implementation="xla"` means.

Whatever the storage type, sums are taken in float32 (float64 for float64) and rounded once, on
the way out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type sums are taken in: float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


Axes = int | tuple[int, ...]


def contract(
    a: jax.Array,
    b: jax.Array,
    axes_a: Axes,
    axes_b: Axes,
    precision: lax.Precision | None = None,
) -> jax.Array:
    """The sum over the given axes of two arrays of one dtype, in the accumulator's type.

    Says which axes instead of transposing: XLA's CPU compiler turns `a @ b.T` in bfloat16 into
    a product five times slower (jax 0.10.2 and 0.12.0, 256×1024→1024).
    """
    summed = _axes(axes_a, a.ndim), _axes(axes_b, b.ndim)
    return lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=accumulator(a.dtype)
    )


def contract_narrow(a: jax.Array, b: jax.Array, axes_a: Axes, axes_b: Axes) -> jax.Array:
    """`contract` where one side of the product is as narrow as the rank.

    In float32 it is one: GPUs would otherwise round its operands to TF32's ten bits, in h even for
    operands of 16 bits. The wide product x·W is left to JAX's own `jax_default_matmul_precision`.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return contract(a, b, axes_a, axes_b, precision)


def _halves(wide: jax.Array) -> jax.Array:
    """Float32 `(..., rank)` as bfloat16 `(..., 2 * rank)`: the numbers rounded, and what is left.

    Not by converting there and back, which XLA takes for nothing (`xla_allow_excess_precision`).
    """
    high = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    low = jnp.where(jnp.isfinite(high), wide - high, 0)
    return jnp.concatenate([high, low], -1).astype(jnp.bfloat16)


def _twice(narrow: jax.Array, axis: int) -> jax.Array:
    """What `_halves` are multiplied by, for the sum of both."""
    return jnp.concatenate([narrow, narrow], axis)


def _sum_of_halves(product: jax.Array, axis: int) -> jax.Array:
    high, low = jnp.split(product, 2, axis)
    return high + low


def _axes(axes: Axes, ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in ((axes,) if isinstance(axes, int) else axes))


def forward(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    kernel: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    scaling: float | jax.Array,
    split: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`y = x·W + bias + s·(x·A)·B` and `h = x·A`.

    Args:
        x: `(..., in_features)`.
        lora_a: `(in_features, rank)`.
        lora_b: `(rank, out_features)`, in x's dtype or the accumulator's.
        kernel: `(in_features, out_features)`, or None for the low-rank part alone.
        bias: `(out_features,)` or None.
        scaling: a scalar.
        split: whether a float32 h is multiplied by bfloat16 factors as the sum of two bfloat16
            arrays: 16 bits of each number, of whose sums 1e-5 of their size is asked. For GPUs,
            where a float32 product with B takes up to as long as x·W.

    Returns:
        y `(..., out_features)` in x's dtype and h `(..., rank)` in the accumulator's.
    """
    h = contract_narrow(x, lora_a, -1, 0)
    if split and lora_b.dtype == jnp.bfloat16:
        y = contract(_halves(scaling * h), _twice(lora_b, 0), -1, 0)
    else:
        y = scaling * contract_narrow(h, lora_b.astype(h.dtype), -1, 0)
    if kernel is not None:
        y += contract(x, kernel, -1, 0)
    if bias is not None:
        y += bias
    return y.astype(x.dtype), h


def backward(
    g: jax.Array,
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    h: jax.Array,
    kernel: jax.Array | None = None,
    *,
    scaling: float,
    grads: Iterable[str] = "xab",
    split: bool = False,
) -> tuple[jax.Array, ...]:
    """The gradients of `forward` for x, A and B, those that `grads` names, in this order.

    With `t = s·g·Bᵀ`: `dx = g·Wᵀ + t·Aᵀ`, `dA = xᵀ·t`, `dB = s·hᵀ·g` (LoRA: Hu et al., 2021,
    arXiv:2106.09685, section 4.1 differentiated).

    Args:
        g: `(..., out_features)`, the cotangent of y.
        x: `(..., in_features)`.
        lora_a: `(in_features, rank)`.
        lora_b: `(rank, out_features)`.
        h: `(..., rank)`, as `forward` returned it.
        kernel: `(in_features, out_features)` or None.
        scaling: a scalar.
        grads: letters of "xab".
        split: as of `forward`, of h and t.

    Returns:
        The gradients, each in the dtype of its operand.
    """
    wide = h.dtype
    rows = tuple(range(x.ndim - 1))
    split = split and lora_b.dtype == jnp.bfloat16
    if split:
        t = scaling * contract(g, lora_b, -1, 1)
    else:
        t = scaling * contract_narrow(g.astype(wide), lora_b.astype(wide), -1, 1)
    results = []
    if "x" in grads:
        if split:
            dx = contract(_halves(t), _twice(lora_a, 1), -1, 1)
        else:
            dx = contract_narrow(t, lora_a.astype(wide), -1, 1)
        if kernel is not None:
            dx += contract(g, kernel, -1, 1)
        results.append(dx.astype(x.dtype))
    if "a" in grads:
        if split:
            da = _sum_of_halves(contract(x, _halves(t), rows, rows), 1)
        else:
            da = contract_narrow(x.astype(wide), t, rows, rows)
        results.append(da.astype(lora_a.dtype))
    if "b" in grads:
        if split:
            db = _sum_of_halves(contract(_halves(h), g, rows, rows), 0)
        else:
            db = contract_narrow(h, g.astype(wide), rows, rows)
        results.append((scaling * db).astype(lora_b.dtype))
    return tuple(results)


def tangent(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    h: jax.Array,
    kernel: jax.Array | None = None,
    *,
    scaling: float,
    dots: Mapping[str, jax.Array],
) -> jax.Array:
    """How y moves with its operands: `ẏ = ẋ·W + x·Ẇ + ḃias + s·((ẋ·A + x·Ȧ)·B + h·Ḃ)`.

    Args:
        x: `(..., in_features)`.
        lora_a: `(in_features, rank)`.
        lora_b: `(rank, out_features)`.
        h: `(..., rank)`, as `forward` returned it.
        kernel: `(in_features, out_features)` or None.
        scaling: a scalar.
        dots: the tangents that are not zero, by the letters "x", "a", "b", "w" for W and "c" for
            bias.

    Returns:
        `(..., out_features)` in the accumulator's dtype; linear in the tangents, and for x, A and B
        what `backward` is the transpose of.
    """
    wide = h.dtype
    h_dot: Any = [contract_narrow(dots["x"], lora_a, -1, 0)] if "x" in dots else []
    if "a" in dots:
        h_dot.append(contract_narrow(x, dots["a"], -1, 0))
    y_dot: Any = (
        [scaling * contract_narrow(sum(h_dot), lora_b.astype(wide), -1, 0)] if h_dot else []
    )
    if "b" in dots:
        y_dot.append(scaling * contract_narrow(h, dots["b"].astype(wide), -1, 0))
    if "x" in dots and kernel is not None:
        y_dot.append(contract(dots["x"], kernel, -1, 0))
    if "w" in dots:
        y_dot.append(contract(x, dots["w"], -1, 0))
    if "c" in dots:
        shape = (*x.shape[:-1], dots["c"].shape[0])
        y_dot.append(jnp.broadcast_to(dots["c"].astype(wide), shape))
    return sum(y_dot)
