"""The two calls as JAX primitives: result shapes, derivatives, batching, lowering.

`lora_forward_p` and `lora_backward_p` stand for the mathematics on any platform. What becomes of
them is decided when they are lowered, where the platform is known at last: on a platform with
native libraries they become custom calls, partitioned as `partitioning` says; elsewhere the
definition is compiled.

Operands have batch axes in front, the same number each, as many as A has beyond two, of the full
size or of size 1 where the operand is the same for all elements; x, g, h and y have any number of
row axes after those. Results have the full batch.

Derivatives. The tangent of `lora_forward_p` is `lora_tangent_p`, a primitive linear in the tangents
of those operands that somebody differentiates for. Transposed it is `lora_backward_p` for x, A and
B, and plain dots for W and bias. So what is not asked for is not computed, forward mode works, and
a batch is known before the gradient is taken: adapters shared by a vmapped x get one call that sums
their gradients, not one of each element's. Derivatives of higher order are JAX's own of the
definition.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

# JAX looks a primitive up in this set to know whether its lowering needs the devices, as that of
# `custom_partitioning` does. There is no public way in (Transformer Engine does the same); without
# it every sharded program fails, as test_partitioning.py would.
from jax._src.dispatch import prim_requires_devices_during_lowering  # isort: skip

from jax_fused_lora import batch, custom_calls, partitioning, reference
from jax_fused_lora.implementations import available_on, implementations

H_NAME = "lora_h"  # of the residual h = x·A, for policies of `jax.checkpoint`

lora_forward_p = Primitive("lora_forward")
lora_tangent_p = Primitive("lora_tangent")
lora_backward_p = Primitive("lora_backward")
for _primitive in (lora_forward_p, lora_backward_p):
    _primitive.multiple_results = True
    prim_requires_devices_during_lowering.add(_primitive)


def forward(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    kernel: jax.Array | None,
    bias: jax.Array | None,
    *,
    scaling: float,
    implementation: str | None,
) -> jax.Array:
    """What `reference.forward` calls y, by custom call where one serves."""
    rest = [operand for operand in (kernel, bias) if operand is not None]
    operands = _varying_alike(x, lora_a, lora_b, *rest)
    return lora_forward_p.bind(*operands, scaling=scaling, implementation=implementation)[0]


def _varying_alike(*operands: jax.Array) -> list[jax.Array]:
    """Inside `shard_map`, makes every operand vary over the mesh axes that any of them varies over.

    A gradient of an operand that is the same on all devices is the sum over them of what each
    computes. The transpose of this cast is that sum; the calls behind it have none of their own,
    and their gradients of replicated adapters would silently be one device's part.
    """
    vmas = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    every = frozenset().union(*vmas)
    return [
        o if own == every else jax.lax.pcast(o, tuple(every - own), to="varying")
        for o, own in zip(operands, vmas, strict=True)
    ]


# ---- The mathematics.


def _reference_forward(
    *operands: jax.Array, scaling: float, implementation: str | None, split: bool = False
) -> Any:
    _must_serve(implementation)
    each = partial(reference.forward, scaling=scaling, split=split)
    return batch.each(each, _batch_axes(*operands), operands)


def _reference_backward(
    *operands: jax.Array,
    scaling: float,
    grads: str,
    implementation: str | None,
    split: bool = False,
) -> Any:
    _must_serve(implementation)
    each = partial(reference.backward, scaling=scaling, grads=grads, split=split)
    return batch.each(each, _batch_axes(*operands[1:]), operands)


def _reference_tangent(
    *operands: jax.Array, scaling: float, moving: str, implementation: str | None
) -> jax.Array:
    def each(*operands: jax.Array) -> jax.Array:
        given, dots = operands[: -len(moving)], operands[-len(moving) :]
        return reference.tangent(*given, scaling=scaling, dots=dict(zip(moving, dots, strict=True)))

    return batch.each(each, _batch_axes(*operands), operands)


def _must_serve(implementation: str | None) -> None:
    """The definition stands in for any implementation but one that was asked for by name."""
    if implementation is not None:
        platform = implementations()[implementation].platform
        raise ValueError(
            f"implementation={implementation!r} serves platform {platform!r}, and this program is "
            "compiled for another one; pass implementation=None to take what serves it"
        )


def _batch_axes(x: Any, lora_a: Any, *rest: Any) -> int:
    return lora_a.ndim - 2


# ---- Shapes.


@lora_forward_p.def_abstract_eval
def _forward_shapes(x: Any, lora_a: Any, lora_b: Any, *rest: Any, **params: Any) -> Any:
    axes = lora_a.ndim - 2
    shape = (*batch.full([x, lora_a, lora_b, *rest], axes), *x.shape[axes:-1])
    return (
        x.update(shape=(*shape, lora_b.shape[-1]), weak_type=False),
        x.update(
            shape=(*shape, lora_a.shape[-1]),
            dtype=reference.accumulator(x.dtype),
            weak_type=False,
        ),
    )


@lora_tangent_p.def_abstract_eval
def _tangent_shape(x: Any, lora_a: Any, lora_b: Any, *rest: Any, **params: Any) -> Any:
    y, h = _forward_shapes(x, lora_a, lora_b, *rest)
    return y.update(dtype=h.dtype)  # rounded by who takes it


@lora_backward_p.def_abstract_eval
def _backward_shapes(
    g: Any, x: Any, lora_a: Any, lora_b: Any, *rest: Any, grads: str, **params: Any
) -> Any:
    axes, operands = lora_a.ndim - 2, {"x": x, "a": lora_a, "b": lora_b}
    sizes = batch.full([g, x, lora_a, lora_b, *rest], axes)
    of = [operands[name] for name in grads]
    return tuple(o.update(shape=(*sizes, *o.shape[axes:]), weak_type=False) for o in of)


# ---- Derivatives.


_MOVING = "xabwc"  # operands of lora_forward_p that have tangents: x, A, B, W and bias


def _forward_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    x, lora_a, lora_b, *kernel_and_bias = primals
    y, h = lora_forward_p.bind(*primals, **params)
    h = checkpoint_name(h, H_NAME)
    dots = {name: dot for name, dot in zip(_MOVING, tangents, strict=False) if not _is_zero(dot)}
    y_dot = _zero(y)
    if dots:
        kernel = kernel_and_bias[:1]
        y_dot = lora_tangent_p.bind(
            x, lora_a, lora_b, h, *(kernel if "x" in dots else []), *dots.values(),
            moving="".join(dots), **params,
        ).astype(y.dtype)  # fmt: skip
    # The tangent of h is of use in derivatives of higher order alone, and elsewhere dropped.
    x_dot, a_dot, *_ = tangents
    return (y, h), (y_dot, _h_dot(x, lora_a, x_dot, a_dot, h))


def _h_dot(x: Any, lora_a: Any, x_dot: Any, a_dot: Any, h: Any) -> Any:
    product = partial(
        batch.each, lambda x, a: reference.contract_narrow(x, a, -1, 0), _batch_axes(x, lora_a)
    )
    terms = [] if _is_zero(x_dot) else [product([x_dot, lora_a])]
    if not _is_zero(a_dot):
        terms.append(product([x, a_dot]))
    return jnp.broadcast_to(sum(terms), h.shape) if terms else _zero(h)


def _tangent_transpose(
    g: Any, x: Any, lora_a: Any, lora_b: Any, h: Any, *rest: Any, moving: str, **params: Any
) -> Any:
    kernel, dots = rest[: -len(moving)], rest[-len(moving) :]
    like = dict(zip(moving, (dot.aval for dot in dots), strict=True))
    known = (None,) * (4 + len(kernel))
    if _is_zero(g):
        return (*known, *map(ad.Zero, like.values()))
    g = g.astype(x.dtype)  # as it was before the tangent's rounding was transposed
    gradients = {}
    if grads := "".join(name for name in "xab" if name in moving):
        results = lora_backward_p.bind(g, x, lora_a, lora_b, h, *kernel, grads=grads, **params)
        gradients = {
            name: _summed_as(result, like[name].shape)
            for name, result in zip(grads, results, strict=True)
        }
    # W is frozen in LoRA, and its gradient a product as large as the layer's own: left to XLA.
    if "w" in moving:
        gradients["w"] = _kernel_gradient(x, g, like["w"])
    if "c" in moving:
        rows = tuple(range(lora_a.ndim - 2, g.ndim - 1))
        d_bias = g.sum(rows, dtype=reference.accumulator(g.dtype))
        gradients["c"] = _summed_as(d_bias, like["c"].shape).astype(g.dtype)
    return (*known, *(gradients[name] for name in moving))


def _kernel_gradient(x: jax.Array, g: jax.Array, like: Any) -> jax.Array:
    axes = like.ndim - 2
    if all(size == 1 for size in like.shape[:axes]):  # all elements' rows meet one W
        g = _summed_as(g, (*x.shape[:axes], *g.shape[axes:]))
        every = tuple(range(x.ndim - 1))
        return reference.contract(x, g, every, every).reshape(like.shape).astype(like.dtype)
    rows = tuple(range(x.ndim - axes - 1))
    # gᵀ·x, and not xᵀ·g: of an x that all elements share XLA's CPU client cannot run the product
    # that becomes of that in bfloat16 (jax 0.10.2, "Unsupported element type for DotThunk").
    product = batch.each(lambda x, g: reference.contract(g, x, rows, rows).T, axes, [x, g])
    return _summed_as(product, like.shape).astype(like.dtype)


def _summed_as(gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of what all elements of a batch share: the sum of each one's."""
    shared = [i for i, size in enumerate(shape) if size != gradient.shape[i]]
    if not shared:
        return gradient
    wide = reference.accumulator(gradient.dtype)
    return gradient.sum(shared, dtype=wide, keepdims=True).astype(gradient.dtype)


def _jvp_of_definition(
    primitive: Primitive, definition: Callable[..., Any], primals: Any, tangents: Any, **params: Any
) -> Any:
    """The primitive's own results, with the definition's tangents."""
    of_any_platform = partial(definition, **{**params, "implementation": None})
    dots = [ad.instantiate_zeros(dot) for dot in tangents]
    results = primitive.bind(*primals, **params)
    moved = jax.jvp(of_any_platform, tuple(primals), tuple(dots))[1]
    return results, list(moved) if primitive.multiple_results else moved


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _zero(primal: Any) -> Any:
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


ad.primitive_jvps[lora_forward_p] = _forward_jvp
ad.primitive_transposes[lora_tangent_p] = _tangent_transpose
for _primitive, _definition in (
    (lora_tangent_p, _reference_tangent),
    (lora_backward_p, _reference_backward),
):
    ad.primitive_jvps[_primitive] = partial(_jvp_of_definition, _primitive, _definition)


# ---- Results that nobody uses. Where they are dropped is before the platform is known.


def _forward_dce(used: Sequence[bool], *rest: Any) -> Any:
    """Of a checkpointed layer whose y is not needed again: h alone is x·A alone."""
    eqn = rest[-1]  # newer versions of JAX pass more before it
    if not any(used):
        return [False] * len(eqn.invars), None
    lora_a = eqn.invars[1].aval
    if used[0] or lora_a.ndim > 2:
        return [True] * len(eqn.invars), eqn
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars[:2]]
    shrink = lambda x, a: reference.contract_narrow(x, a, -1, 0)  # noqa: E731
    (dot,) = jax.make_jaxpr(shrink)(*shapes).jaxpr.eqns
    of_two = eqn.replace(
        primitive=dot.primitive,
        params=dot.params,
        invars=eqn.invars[:2],
        outvars=eqn.outvars[1:],
    )
    return [True, True] + [False] * (len(eqn.invars) - 2), of_two


def _backward_dce(used: Sequence[bool], *rest: Any) -> Any:
    eqn = rest[-1]
    grads = "".join(name for name, use in zip(eqn.params["grads"], used, strict=True) if use)
    if not grads:
        return [False] * len(eqn.invars), None
    needed = [i < 5 or "x" in grads for i in range(len(eqn.invars))]  # W for dx alone
    fewer = eqn.replace(
        params={**eqn.params, "grads": grads},
        invars=[v for v, need in zip(eqn.invars, needed, strict=True) if need],
        outvars=[v for v, use in zip(eqn.outvars, used, strict=True) if use],
    )
    return needed, fewer


partial_eval.dce_rules[lora_forward_p] = _forward_dce
partial_eval.dce_rules[lora_backward_p] = _backward_dce


# ---- Batching.


def _batch_rule(
    primitive: Primitive,
    rows: Callable[..., set[int]],
    operands: Sequence[jax.Array],
    dims: Sequence[Any],
    **params: Any,
) -> tuple[Any, Any]:
    """Batches a call: as one more row axis where all that is mapped has rows, else as a batch axis.

    An operand that is not mapped is never copied per element: a row axis needs that every operand
    with rows is mapped, and results all to have rows; as a batch axis it has size 1.
    """
    lora_a = operands[2 if primitive is lora_backward_p else 1]
    dim_of_a = dims[2 if primitive is lora_backward_p else 1]
    axes = lora_a.ndim - 2 - (dim_of_a is not None)
    mapped = {i for i, dim in enumerate(dims) if dim is not None}
    as_rows = mapped == rows(len(operands), **params)
    at = axes if as_rows else 0
    moved = [
        jnp.moveaxis(operand, dim, at) if dim is not None
        else operand if as_rows else jnp.expand_dims(operand, 0)
        for operand, dim in zip(operands, dims, strict=True)
    ]  # fmt: skip
    # What is mapped may vary over more axes: `vmap` of a `shard_map`, with a spmd_axis_name.
    results = primitive.bind(*_varying_alike(*moved), **params)
    return results, [at] * len(results) if primitive.multiple_results else at


def _forward_rows(count: int, **params: Any) -> set[int]:
    return {0}


def _tangent_rows(count: int, *, moving: str, **params: Any) -> set[int]:
    return {0, 3} | ({count - len(moving)} if "x" in moving else set())


def _backward_rows(count: int, *, grads: str, **params: Any) -> set[int]:
    return {0, 1, 4} if grads == "x" else set()  # dA and dB are sums over rows


for _primitive, _rows in (
    (lora_forward_p, _forward_rows),
    (lora_tangent_p, _tangent_rows),
    (lora_backward_p, _backward_rows),
):
    batching.primitive_batchers[_primitive] = partial(_batch_rule, _primitive, _rows)


# ---- Lowering.


def _lower(
    primitive: Primitive,
    fallback: Callable[..., Any],
    native: Callable[..., Any],
    call: partitioning.Call,
) -> None:
    mlir.register_lowering(primitive, mlir.lower_fun(fallback, multiple_results=True))
    for platform in ("cpu", "cuda", "rocm"):
        # On GPUs XLA takes longer over h·B in float32 than over x·W in bfloat16 (H100: the
        # definition as it stands took 1.2 to 2.1 of the time of one that rounds h and t).
        definition = fallback if platform == "cpu" else partial(fallback, split=True)
        everywhere = definition
        if available_on(platform):
            on_one_device = partial(native, definition, platform=platform)
            everywhere = partial(partitioning.partitioned, call, on_one_device, definition)
        mlir.register_lowering(
            primitive, mlir.lower_fun(everywhere, multiple_results=True), platform=platform
        )


_lower(lora_forward_p, _reference_forward, custom_calls.forward, partitioning.FORWARD)
_lower(lora_backward_p, _reference_backward, custom_calls.backward, partitioning.BACKWARD)
mlir.register_lowering(lora_tangent_p, mlir.lower_fun(_reference_tangent, multiple_results=False))


@functools.lru_cache(maxsize=1024)
def _program(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(primitive.bind, **dict(params)))


def _run(primitive: Primitive, *operands: jax.Array, **params: Any) -> Any:
    """Outside of any `jax.jit`, or where that is disabled: one call is a program."""
    with jax.disable_jit(False):
        return _program(primitive, tuple(sorted(params.items())))(*operands)


for _primitive in (lora_forward_p, lora_tangent_p, lora_backward_p):
    _primitive.def_impl(partial(_run, _primitive))
