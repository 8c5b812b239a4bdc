"""The definition of the two calls in `jax.numpy`, forward and backward.

Every implementation equals these functions, values and gradients. They are also what runs where
no native code serves, and what `implementation="xla"` means.

Whatever the storage type, sums are taken in float32 (float64 for float64) and rounded once, on
the way out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type sums are taken in: float32, or `dtype` where that is wider."""
    own = jnp.dtype(dtype)
    return own if own.itemsize >= 4 else jnp.dtype(jnp.float32)


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


def _halves(
    wide: jax.Array, dtype: jax.typing.DTypeLike, axes: Axes
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Float32 numbers, scaled, as the sum of two 16-bit ones: rounded, and what is left.

    Not by converting there and back, which XLA takes for nothing (`xla_allow_excess_precision`).

    Returns:
        The two, and what they were scaled by, for each place along the other axes: bfloat16 by 1;
        float16, since h and t may be of any size, so that the largest along `axes` is 2¹⁴. There
        two halves hold 22 bits of a number, but no less than 2⁻³⁹ of the largest.
    """
    scale = jnp.ones((1,) * wide.ndim, wide.dtype)
    if dtype == jnp.float16:
        sizes = jnp.where(jnp.isfinite(wide), jnp.abs(wide), 0)
        largest = jnp.max(sizes, axes, keepdims=True, initial=0)
        scale = 2.0**14 / jnp.maximum(largest, 2.0**-100)
    wide = scale * wide
    bits = jnp.finfo(dtype)
    high = lax.reduce_precision(wide, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)
    low = jnp.where(jnp.isfinite(high), wide - high, 0)
    return (high.astype(dtype), low.astype(dtype)), scale


def _contract_split(wide: jax.Array, narrow: jax.Array, axis: int) -> jax.Array:
    """`contract(wide, narrow, -1, axis)` of float32 (..., rank) and a 16-bit factor, by halves.

    The halves lie side by side, and the factor twice; or, of few rows, behind each other, which
    leaves the factor as it is (H100, 16 rows of 4096→4096, forward, to rounding h once: rank 256
    1.12 → 0.98, rank 128 1.09 → 1.04).
    """
    halves, scale = _halves(wide, narrow.dtype, -1)
    if _few_rows(wide):
        product = contract(jnp.stack(halves), narrow, -1, axis).sum(0)
    else:
        twice = jnp.concatenate([narrow, narrow], axis)
        product = contract(jnp.concatenate(halves, -1), twice, -1, axis)
    return product / scale


def _sum_rows_split(left: jax.Array, right: jax.Array) -> jax.Array:
    """`left`ᵀ·`right`, summed over rows, one of them float32 (..., rank), by halves as above.

    Behind each other they need no sum of results (16 rows of 4096→4096, forward and backward: rank
    256 1.39 → 1.06, rank 128 1.30 → 1.13). One row is better multiplied number by number.
    """
    rows = tuple(range(left.ndim - 1))
    axis, wide, narrow = (0, left, right) if left.dtype == jnp.float32 else (1, right, left)

    def product(wide: jax.Array, narrow: jax.Array, rows: tuple[int, ...]) -> jax.Array:
        return contract(*((narrow, wide) if axis else (wide, narrow)), rows, rows)

    halves, scale = _halves(wide, narrow.dtype, rows)
    if _few_rows(wide) and _rows(wide) > 1:
        total = product(jnp.stack(halves), jnp.stack((narrow, narrow)), (*rows, len(rows)))
    else:
        high, low = jnp.split(product(jnp.concatenate(halves, -1), narrow, rows), 2, axis)
        total = high + low
    return total / scale.reshape((1, -1) if axis else (-1, 1))


def _is_16_bit(operand: jax.Array) -> bool:
    return operand.dtype in (jnp.bfloat16, jnp.float16)


def _halves_pay(factor: jax.Array, kernel: jax.Array | None) -> bool:
    """Whether `_contract_split` is faster than a product in float32.

    Not alone in float16, where the product is a matrix in float32 before its rows are scaled back
    (H200, 4096→4096, rank 16, forward: 128 rows 5.8 → 8.8 µs, 8192 rows 85 → 114). Beside x·W it is
    one anyway (640 rows 50.6 → 49.4, with the backward pass 136 → 123).
    """
    return _is_16_bit(factor) and (factor.dtype == jnp.bfloat16 or kernel is not None)


def _rows(operand: jax.Array) -> int:
    return math.prod(operand.shape[:-1])


def _few_rows(wide: jax.Array) -> bool:
    """Whether (..., rank) has no more rows than ranks; sizes may be symbols, which are not few."""
    rows, rank = _rows(wide), wide.shape[-1]
    return isinstance(rows, int) and isinstance(rank, int) and 0 < rows <= rank


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
        split: whether a float32 h is multiplied by 16-bit factors as the sum of two such arrays: 16
            bits or more of each number, of whose sums 1e-5 of their size is asked. For GPUs, where
            a float32 product with B takes up to as long as x·W.

    Returns:
        y `(..., out_features)` in x's dtype and h `(..., rank)` in the accumulator's.
    """
    h = contract_narrow(x, lora_a, -1, 0)
    if split and _halves_pay(lora_b, kernel):
        y = _contract_split(scaling * h, lora_b, 0)
    else:
        y = scaling * contract_narrow(h, lora_b.astype(h.dtype), -1, 0)
    if kernel is not None:
        y += contract(x, kernel, -1, 0)
    if bias is not None:
        y += jnp.expand_dims(bias.astype(y.dtype), tuple(range(y.ndim - 1)))
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
    split = split and _is_16_bit(lora_b)
    if split:
        t = scaling * contract(g, lora_b, -1, 1)
    else:
        t = scaling * contract_narrow(g.astype(wide), lora_b.astype(wide), -1, 1)
    results = []
    if "x" in grads:
        if split and _halves_pay(lora_a, kernel):
            dx = _contract_split(t, lora_a, 1)
        else:
            dx = contract_narrow(t, lora_a.astype(wide), -1, 1)
        if kernel is not None:
            dx += contract(g, kernel, -1, 1)
        results.append(dx.astype(x.dtype))
    if "a" in grads:
        results.append(gradient_of_a(x, t, lora_a.dtype, split=split))
    if "b" in grads:
        results.append(gradient_of_b(g, h, lora_b.dtype, scaling=scaling, split=split))
    return tuple(results)


def gradient_of_a(
    x: jax.Array, t: jax.Array, dtype: jax.typing.DTypeLike, *, split: bool
) -> jax.Array:
    """`dA = xᵀ·t`, (in_features, rank), as `backward` has it, in the given dtype."""
    if split:
        return _sum_rows_split(x, t).astype(dtype)
    rows = tuple(range(x.ndim - 1))
    return contract_narrow(x.astype(t.dtype), t, rows, rows).astype(dtype)


def gradient_of_b(
    g: jax.Array, h: jax.Array, dtype: jax.typing.DTypeLike, *, scaling: float, split: bool
) -> jax.Array:
    """`dB = s·hᵀ·g`, (rank, out_features), as `backward` has it, in the given dtype."""
    if split:
        db = _sum_rows_split(h, g)
    else:
        rows = tuple(range(g.ndim - 1))
        db = contract_narrow(h, g.astype(h.dtype), rows, rows)
    return (scaling * db).astype(dtype)


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
