"""`lora_forward` and `lora_linear`: what a user calls."""

import dataclasses
import math
import numbers
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jax_fused_lora import custom_calls, forms, reference
from jax_fused_lora.implementations import implementations

_NATIVE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def lora_forward(
    x: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    *,
    scaling: float | jax.Array = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """The low-rank part of a LoRA layer alone: `scaling · (x·A)·B`.

    LoRA: Hu et al., 2021, arXiv:2106.09685, equation 3. Sums are taken in float32 and rounded
    once to x's dtype. Differentiable for x, lora_a, lora_b and a traced scaling; only the
    gradients that are asked for are computed.

    Args:
        x: `(..., in_features)`, float32, bfloat16 or float16; another floating dtype is computed
            by XLA.
        lora_a: `(in_features, rank)`, x's dtype.
        lora_b: `(rank, out_features)`, x's dtype.
        scaling: a scalar, alpha / rank in the paper. A Python number is compiled in; a JAX scalar
            is an operand and has a gradient.
        implementation: one of `implementations()` by name, or None for the best that serves the
            platform, dtype and shape.

    Returns:
        `(..., out_features)`, x's dtype.

    Raises:
        ValueError: a shape does not fit, or the named implementation cannot serve.
        TypeError: dtypes differ or are not floating.
    """
    return _lora(x, lora_a, lora_b, None, None, scaling, implementation)


def lora_linear(
    x: ArrayLike,
    kernel: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    scaling: float | jax.Array = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """A linear layer with its LoRA adapter: `x·W + bias + scaling · (x·A)·B`.

    As `lora_forward`, with the frozen layer in the same call. W and bias have gradients too,
    computed by plain XLA operations and only when asked for.

    Args:
        x: `(..., in_features)`.
        kernel: W, `(in_features, out_features)`, x's dtype.
        lora_a: `(in_features, rank)`, x's dtype.
        lora_b: `(rank, out_features)`, x's dtype.
        bias: `(out_features,)`, x's dtype, or None.
        scaling: as in `lora_forward`.
        implementation: as in `lora_forward`.

    Returns:
        `(..., out_features)`, x's dtype.

    Raises:
        ValueError: a shape does not fit, or the named implementation cannot serve.
        TypeError: dtypes differ or are not floating.
    """
    if kernel is None:
        raise TypeError("lora_linear: kernel is None; for the low-rank part alone use lora_forward")
    return _lora(x, lora_a, lora_b, kernel, bias, scaling, implementation)


def _lora(
    x: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    kernel: ArrayLike | None,
    bias: ArrayLike | None,
    scaling: float | jax.Array,
    implementation: str | None,
) -> jax.Array:
    given = {"x": x, "kernel": kernel, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    operands = {name: _array(name, value) for name, value in given.items() if value is not None}
    _check_shapes(operands)
    _check_dtypes(operands)
    scaling = _check_scaling(scaling)
    _check_implementation(implementation, operands["x"].dtype, operands["lora_a"].shape[1])

    x, lora_a, lora_b = operands["x"], operands["lora_a"], operands["lora_b"]
    kernel, bias = operands.get("kernel"), operands.get("bias")
    if implementation == "xla" or x.dtype not in _NATIVE_DTYPES:
        return reference.forward(x, lora_a, lora_b, kernel, bias, scaling=scaling)[0]
    if not isinstance(scaling, float):
        # In float32, whatever B's dtype: in 16 bits the product would lose B's low bits.
        lora_b = scaling.astype(jnp.float32) * lora_b.astype(jnp.float32)
        scaling = 1.0
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not -1, which an empty x leaves open
    y = _call(_Static(scaling, implementation), *_varying_alike(rows, lora_a, lora_b, kernel, bias))
    return y.reshape(*x.shape[:-1], lora_b.shape[1])


def _varying_alike(*operands: jax.Array | None) -> list[jax.Array | None]:
    """Inside `shard_map`, makes every operand vary over the mesh axes that any of them varies over.

    A gradient of an operand that is the same on all devices is the sum over them of what each
    computes. The transpose of this cast is that sum; a `custom_vjp` behind it has none of its own,
    and its gradients of replicated adapters would silently be one device's part.
    """
    vmas = [frozenset() if o is None else jax.typeof(o).manual_axis_type.varying for o in operands]
    every = frozenset().union(*vmas)
    return [
        o if o is None or own == every else jax.lax.pcast(o, tuple(every - own), to="varying")
        for o, own in zip(operands, vmas, strict=True)
    ]


# ---- The differentiable call on two-dimensional operands.


@dataclasses.dataclass(frozen=True)
class _Static:
    scaling: float
    implementation: str | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which operands are differentiated; a residual without arrays."""

    x: bool
    lora_a: bool
    lora_b: bool
    kernel: bool
    bias: bool

    @property
    def grads(self) -> str:
        return "x" * self.x + "a" * self.lora_a + "b" * self.lora_b


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(static: _Static, x: Any, lora_a: Any, lora_b: Any, kernel: Any, bias: Any) -> jax.Array:
    return custom_calls.forward(
        x, lora_a, lora_b, kernel, bias,
        scaling=static.scaling, implementation=static.implementation,
    )[0]  # fmt: skip


def _call_fwd(static: _Static, *primals: Any) -> Any:
    wanted = _Wanted(*(primal is not None and primal.perturbed for primal in primals))
    values: Any = [None if primal is None else primal.value for primal in primals]
    x, lora_a, lora_b, kernel, bias = values
    y, h = custom_calls.forward(
        x, lora_a, lora_b, kernel, bias,
        scaling=static.scaling, implementation=static.implementation,
    )  # fmt: skip
    return y, (wanted, x, lora_a, lora_b, kernel, h)


def _call_bwd(static: _Static, residuals: Any, g: Any) -> Any:
    wanted, x, lora_a, lora_b, kernel, h = residuals
    if isinstance(g, SymbolicZero):
        return (None,) * 5
    named = {}
    if wanted.grads:
        results = custom_calls.backward(
            g, x, lora_a, lora_b, h, kernel,
            scaling=static.scaling, grads=wanted.grads, implementation=static.implementation,
        )  # fmt: skip
        named = dict(zip(wanted.grads, results, strict=True))
    d_kernel = reference.contract(x, g, 0, 0).astype(kernel.dtype) if wanted.kernel else None
    d_bias = g.sum(0, dtype=reference.accumulator(g.dtype)).astype(g.dtype) if wanted.bias else None
    return named.get("x"), named.get("a"), named.get("b"), d_kernel, d_bias


_call.defvjp(_call_fwd, _call_bwd, symbolic_zeros=True)


# ---- Checks, before anything is compiled.


def _array(name: str, value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from error


def _check_shapes(operands: dict[str, jax.Array]) -> None:
    shapes = {name: operand.shape for name, operand in operands.items()}

    def wrong(name: str, needed: str, other: str) -> NoReturn:
        raise ValueError(
            f"{name} has shape {shapes[name]}, needed {needed} to match {other} of shape "
            f"{shapes[other]}"
        )

    for name, needed in (
        ("lora_a", "(in_features, rank)"),
        ("lora_b", "(rank, out_features)"),
        ("kernel", "(in_features, out_features)"),
    ):
        if name in shapes and len(shapes[name]) != 2:
            raise ValueError(f"{name} has shape {shapes[name]}, needed two dimensions {needed}")
    if len(shapes["x"]) < 1:
        raise ValueError("x has shape (), needed at least one dimension (..., in_features)")
    k, r, n = shapes["x"][-1], shapes["lora_a"][1], shapes["lora_b"][1]
    if shapes["lora_a"][0] != k:
        wrong("lora_a", f"({k}, rank)", "x")
    if shapes["lora_b"][0] != r:
        wrong("lora_b", f"({r}, out_features)", "lora_a")
    if "kernel" in shapes and shapes["kernel"][0] != k:
        wrong("kernel", f"({k}, out_features)", "x")
    if "kernel" in shapes and shapes["kernel"][1] != n:
        wrong("kernel", f"({k}, {n})", "lora_b")
    if "bias" in shapes and shapes["bias"] != (n,):
        wrong("bias", f"({n},)", "lora_b")


def _check_dtypes(operands: dict[str, jax.Array]) -> None:
    dtype = operands["x"].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x is {dtype}, needed a floating dtype")
    for name, operand in operands.items():
        if operand.dtype != dtype:
            raise TypeError(
                f"{name} is {operand.dtype}, needed {dtype} to match x; "
                f"cast one of them, for example {name}.astype(x.dtype)"
            )


def _check_scaling(scaling: Any) -> float | jax.Array:
    """A Python float for a number, which is compiled in; a scalar array for anything traced."""
    if isinstance(scaling, numbers.Real):
        return float(scaling)
    scaling = _array("scaling", scaling)
    if scaling.shape != ():
        raise ValueError(f"scaling has shape {scaling.shape}, needed a scalar")
    if not any(jnp.issubdtype(scaling.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"scaling is {scaling.dtype}, needed a real number")
    return scaling


def _check_implementation(implementation: str | None, dtype: Any, rank: int) -> None:
    if implementation is None:
        return
    known = implementations()
    if implementation not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"implementation is {implementation!r}, needed None or one of {names}")
    if not known[implementation].available:
        raise ValueError(
            f"implementation={implementation!r} is not available: {known[implementation].reason}"
        )
    if implementation != "xla" and dtype not in _NATIVE_DTYPES:
        raise ValueError(
            f"implementation={implementation!r} serves float32, bfloat16 and float16, x is "
            f"{dtype}; pass implementation=None or 'xla'"
        )
    most = forms.MAX_RANK.get(implementation, rank)
    if rank > most:
        raise ValueError(
            f"implementation={implementation!r} serves ranks up to {most}, lora_a has {rank}; pass "
            "implementation=None or 'xla'"
        )
