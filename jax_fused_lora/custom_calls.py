"""The two custom calls as JAX primitives: result shapes, lowering, batching rule.

`lora_forward_p` and `lora_backward_p` stand for the mathematics on any platform. What becomes of
them is decided when they are lowered, where the platform is known at last: on a platform with
native libraries the rule in `forms` picks one and its form and the FFI call is made; elsewhere the
definition is compiled. A partitioning rule belongs between the two: in `_native_forward` and
`_native_backward`, around the FFI call.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_fused_lora import forms, reference
from jax_fused_lora.implementations import available_on, implementations, load

lora_forward_p = Primitive("lora_forward")
lora_backward_p = Primitive("lora_backward")
for _primitive in (lora_forward_p, lora_backward_p):
    _primitive.multiple_results = True


def forward(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    kernel: jax.Array | None,
    bias: jax.Array | None,
    *,
    scaling: float,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """`reference.forward` for two-dimensional x, by custom call where one serves."""
    rest = [operand for operand in (kernel, bias) if operand is not None]
    y, h = lora_forward_p.bind(
        x, lora_a, lora_b, *rest, scaling=scaling, implementation=implementation
    )
    return y, h


def backward(
    g: jax.Array,
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    h: jax.Array,
    kernel: jax.Array | None,
    *,
    scaling: float,
    grads: str,
    implementation: str | None,
) -> tuple[jax.Array, ...]:
    """`reference.backward`, by custom call where one serves."""
    rest = [] if kernel is None or "x" not in grads else [kernel]
    return tuple(
        lora_backward_p.bind(
            g, x, lora_a, lora_b, h, *rest,
            scaling=scaling, grads=grads, implementation=implementation,
        )
    )  # fmt: skip


# ---- The mathematics, and its native form on one platform.


def _reference_forward(*operands: jax.Array, scaling: float, implementation: str | None) -> Any:
    _must_serve(implementation)
    return reference.forward(*operands, scaling=scaling)


def _reference_backward(
    *operands: jax.Array, scaling: float, grads: str, implementation: str | None
) -> Any:
    _must_serve(implementation)
    return reference.backward(*operands, scaling=scaling, grads=grads)


def _must_serve(implementation: str | None) -> None:
    """The definition stands in for any implementation but one that was asked for by name."""
    if implementation is not None:
        platform = implementations()[implementation].platform
        raise ValueError(
            f"implementation={implementation!r} serves platform {platform!r}, and this program is "
            "compiled for another one; pass implementation=None to take what serves it"
        )


def _native_forward(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    *rest: jax.Array,
    platform: str,
    scaling: float,
    implementation: str | None,
) -> Any:
    (m, k), (r, n) = x.shape, lora_b.shape
    library, form = _route(forms.forward_form, platform, implementation, x, lora_b, rest)
    if form == "xla":
        return _reference_forward(
            x, lora_a, lora_b, *rest, scaling=scaling, implementation=implementation
        )
    if form == "base":
        rest = (_base(library, x, rest[0], 0), *rest[1:])
    in_place = form == "base" and x.dtype == jnp.float32
    on_cpu = library == "cpu"
    slices = _product_slices(m, k, n, x.dtype.itemsize) if on_cpu and form == "kernel" else 0
    floats = {
        "cpu": lambda: r * (k + _padded(n)) + n + slices * m * n,
        "metal": lambda: 0,
        "cuda": lambda: load("cuda").workspace(m, k, n, r, form, ""),
    }[library]()
    y, h, _ = jax.ffi.ffi_call(
        load(library).targets["lora_forward"],
        (
            jax.ShapeDtypeStruct((m, n), x.dtype),
            jax.ShapeDtypeStruct((m, r), jnp.float32),
            _workspace(floats),
        ),
        input_output_aliases={3: 0} if in_place else None,
    )(x, lora_a, lora_b, *rest,
      scaling=np.float32(scaling), form=form, slices=np.int64(max(slices, 1)))  # fmt: skip
    return y, h


def _native_backward(
    g: jax.Array,
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    h: jax.Array,
    *rest: jax.Array,
    platform: str,
    scaling: float,
    grads: str,
    implementation: str | None,
) -> Any:
    (m, k), (r, n) = x.shape, lora_b.shape
    library, form = _route(forms.backward_form, platform, implementation, x, lora_b, rest)
    if form == "xla":
        return _reference_backward(
            g, x, lora_a, lora_b, h, *rest,
            scaling=scaling, grads=grads, implementation=implementation,
        )  # fmt: skip
    if form == "base":
        rest = (_base(library, g, rest[0], 1),)
    shapes = {"x": x, "a": lora_a, "b": lora_b}
    slices = _row_slices(m) if library == "cpu" else 1
    floats = {
        "cpu": lambda: r * (m + _padded(k) + n + slices * (k + n)),
        "metal": lambda: r * m,  # t
        "cuda": lambda: load("cuda").workspace(m, k, n, r, form, grads),
    }[library]()
    results = jax.ffi.ffi_call(
        load(library).targets["lora_backward"],
        (
            *(jax.ShapeDtypeStruct(shapes[w].shape, shapes[w].dtype) for w in grads),
            _workspace(floats),
        ),
        input_output_aliases={5: 0} if form == "base" and x.dtype == jnp.float32 else None,
    )(g, x, lora_a, lora_b, h, *rest,
      scaling=np.float32(scaling), form=form, grads=grads, slices=np.int64(slices))  # fmt: skip
    return results[:-1]


def _route(
    rule: Callable[..., str],
    platform: str,
    implementation: str | None,
    x: jax.Array,
    lora_b: jax.Array,
    rest: Sequence[jax.Array],
) -> tuple[str, str]:
    """The native library that takes a call, and its form: "xla" where the definition does."""
    (m, k), (r, n) = x.shape, lora_b.shape
    wide_b = lora_b.dtype != x.dtype
    problem = forms.Problem(m, k, n, r, x.dtype.name, has_kernel=bool(rest), wide_b=wide_b)
    available = available_on(platform)
    library = implementation or forms.best_library(available, problem)
    if library not in available:
        return "", "xla"
    named = implementation is not None
    return library, rule(library, problem, product=load(library).product, named=named)


def _base(library: str, rows: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """x·W (axis 0) or g·Wᵀ (axis 1) in float32, by XLA."""
    if forms.widens_base(library, rows.dtype):
        rows, kernel = rows.astype(jnp.float32), kernel.astype(jnp.float32)
    return reference.contract(rows, kernel, 1, axis)


def _workspace(floats: int) -> jax.ShapeDtypeStruct:
    """Scratch memory as a result of the call: XLA plans it, nothing is allocated at run time."""
    return jax.ShapeDtypeStruct((floats,), jnp.float32)


def _padded(columns: int) -> int:
    """Columns of a factor packed in whole panels, 64 wide at most."""
    return -(-columns // 64) * 64


def _product_slices(m: int, k: int, n: int, itemsize: int) -> int:
    """Slices of k that sum x·W separately: enough blocks for all cores, each worth handing out.

    For few rows a slice is a megabyte of W, read from end to end (a thread that reads half of
    every row instead looks up twice the pages: bfloat16, 1×2048→2048, 1.3 times the time).
    """
    if m <= 4:
        return max(1, min(k * n * itemsize >> 20, 16, k // 64))
    return max(1, min(2048 // max(n, 1), 4, k // 256)) if m <= 64 else 1


def _row_slices(m: int) -> int:
    """Row slices that sum dA and dB separately: one a core, none of fewer than 32 rows.

    From 8 rows on two slices pay, whatever their size: a second core has work.
    """
    return max(1, min(2, m // 8), min(os.cpu_count() or 1, m // 32))


# ---- Rules.


def _register(primitive: Primitive, fallback: Callable[..., Any], native: Callable[..., Any]):
    primitive.def_impl(lambda *args, **params: jax.jit(partial(primitive.bind, **params))(*args))
    mlir.register_lowering(primitive, mlir.lower_fun(fallback, multiple_results=True))
    for platform in ("cpu", "cuda"):
        if available_on(platform):
            mlir.register_lowering(
                primitive,
                mlir.lower_fun(partial(native, platform=platform), multiple_results=True),
                platform=platform,
            )


_register(lora_forward_p, _reference_forward, _native_forward)
_register(lora_backward_p, _reference_backward, _native_backward)


@lora_forward_p.def_abstract_eval
def _forward_shapes(x: Any, lora_a: Any, lora_b: Any, *rest: Any, **params: Any) -> Any:
    return (
        x.update(shape=(x.shape[0], lora_b.shape[1]), weak_type=False),
        x.update(
            shape=(x.shape[0], lora_a.shape[1]),
            dtype=reference.accumulator(x.dtype),
            weak_type=False,
        ),
    )


@lora_backward_p.def_abstract_eval
def _backward_shapes(
    g: Any, x: Any, lora_a: Any, lora_b: Any, *rest: Any, grads: str, **params: Any
) -> Any:
    operands = {"x": x, "a": lora_a, "b": lora_b}
    return tuple(operands[w].update(weak_type=False) for w in grads)


def _batch(
    primitive: Primitive,
    rows: Sequence[int],
    operands: Sequence[jax.Array],
    dims: Sequence[Any],
    **params: Any,
) -> tuple[Any, Any]:
    """Batches a call: folds the batch into its rows, or maps over it one call at a time.

    Folding needs that no operand without rows is mapped, and every result to have rows. Otherwise
    `jax.lax.map` runs the calls in turn; an operand that is not mapped is never copied per element.
    """
    mapped = {i for i, dim in enumerate(dims) if dim is not None}
    size = next(operands[i].shape[dims[i]] for i in mapped)
    moved = [
        operand if dim is None else jnp.moveaxis(operand, dim, 0)
        for operand, dim in zip(operands, dims, strict=True)
    ]
    if mapped <= set(rows) and params.get("grads", "x") == "x":
        m = moved[rows[0]].shape[-2]
        folded = [
            jnp.broadcast_to(o, (size, *o.shape[-2:])).reshape(size * m, o.shape[-1])
            if i in rows
            else o
            for i, o in enumerate(moved)
        ]
        results = [r.reshape(size, m, r.shape[1]) for r in primitive.bind(*folded, **params)]
    else:

        def one(batched: Sequence[jax.Array]) -> Any:
            rest = iter(batched)
            full = [next(rest) if i in mapped else moved[i] for i in range(len(moved))]
            return primitive.bind(*full, **params)

        results = jax.lax.map(one, [moved[i] for i in sorted(mapped)])
    return results, [0] * len(results)


batching.primitive_batchers[lora_forward_p] = partial(_batch, lora_forward_p, (0,))
batching.primitive_batchers[lora_backward_p] = partial(_batch, lora_backward_p, (0, 1, 4))
