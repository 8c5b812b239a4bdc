"""`lora_forward` and `lora_linear`: what a user calls."""

import numbers
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_fused_lora import forms, partitioning, primitives, reference
from jax_fused_lora.implementations import implementations

OutSharding = NamedSharding | PartitionSpec | None

_NATIVE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def lora_forward(
    x: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    *,
    scaling: float | jax.Array = 1.0,
    implementation: str | None = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """The low-rank part of a LoRA layer alone: `scaling · (x·A)·B`.

    LoRA: Hu et al., 2021, arXiv:2106.09685, equation 3. Sums are taken in float32 and rounded
    once to x's dtype. Differentiable for x, lora_a, lora_b and a traced scaling, in both modes and
    to any order; only the gradients that are asked for are computed. Besides its operands a layer
    keeps `h = x·A` for the backward pass, which policies of `jax.checkpoint` know as "lora_h":
    `jax.checkpoint_policies.save_only_these_names("lora_h")`.

    Args:
        x: `(..., in_features)`, float32, bfloat16 or float16; another floating dtype is computed
            by XLA.
        lora_a: `(in_features, rank)`, x's dtype.
        lora_b: `(rank, out_features)`, x's dtype.
        scaling: a scalar, alpha / rank in the paper. A Python number is compiled in; a JAX scalar
            is an operand and has a gradient.
        implementation: one of `implementations()` by name, or None for the best that serves the
            platform, dtype and shape.
        out_sharding: the sharding of the result on a mesh with Explicit axes, as of `jnp.einsum`;
            needed where in_features is sharded.

    Returns:
        `(..., out_features)`, x's dtype.

    Raises:
        ValueError: a shape does not fit, or the named implementation cannot serve.
        TypeError: dtypes differ or are not floating.
    """
    return _lora(x, lora_a, lora_b, None, None, scaling, implementation, out_sharding)


def lora_linear(
    x: ArrayLike,
    kernel: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    scaling: float | jax.Array = 1.0,
    implementation: str | None = None,
    out_sharding: OutSharding = None,
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
        out_sharding: as in `lora_forward`.

    Returns:
        `(..., out_features)`, x's dtype.

    Raises:
        ValueError: a shape does not fit, or the named implementation cannot serve.
        TypeError: dtypes differ or are not floating.
    """
    if kernel is None:
        raise TypeError("lora_linear: kernel is None; for the low-rank part alone use lora_forward")
    return _lora(x, lora_a, lora_b, kernel, bias, scaling, implementation, out_sharding)


def _lora(
    x: ArrayLike,
    lora_a: ArrayLike,
    lora_b: ArrayLike,
    kernel: ArrayLike | None,
    bias: ArrayLike | None,
    scaling: float | jax.Array,
    implementation: str | None,
    out_sharding: OutSharding,
) -> jax.Array:
    given = {"x": x, "kernel": kernel, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    optional = ("kernel", "bias")
    operands = {
        name: _array(name, value)
        for name, value in given.items()
        if value is not None or name not in optional
    }
    _check_shapes(operands)
    _check_dtypes(operands)
    scaling = _check_scaling(scaling)
    _check_implementation(implementation, operands["x"].dtype, operands["lora_a"].shape[1])

    # What auto_axes takes becomes an array, and a number is to stay one, compiled in.
    static: Any = {"scaling": scaling} if isinstance(scaling, float) else {}
    traced = {} if static else {"scaling": scaling}
    _check_reduced({**operands, **traced})

    def compute(operands: dict[str, Any]) -> jax.Array:
        return _compute(**operands, **static, implementation=implementation)

    sharding = _explicit_sharding(operands, out_sharding)
    if sharding is None:
        return compute({**operands, **traced})
    # Inside, all axes are Auto: what each device computes is decided as on any other mesh.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        axes = sharding.mesh.explicit_axes
        inside = jax.sharding.auto_axes(compute, axes=axes, out_sharding=sharding)
        return inside({**operands, **traced})


def _compute(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    kernel: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    scaling: float | jax.Array,
    implementation: str | None,
) -> jax.Array:
    if implementation == "xla" or x.dtype not in _NATIVE_DTYPES:
        return reference.forward(x, lora_a, lora_b, kernel, bias, scaling=scaling)[0]
    if not isinstance(scaling, float):
        # In float32, whatever B's dtype: in 16 bits the product would lose B's low bits.
        lora_b = scaling.astype(jnp.float32) * lora_b.astype(jnp.float32)
        scaling = 1.0
    return primitives.forward(
        x, lora_a, lora_b, kernel, bias, scaling=scaling, implementation=implementation
    )


def _explicit_sharding(
    operands: dict[str, jax.Array], out_sharding: OutSharding
) -> NamedSharding | None:
    """The result's sharding on a mesh with Explicit axes; None where there are none.

    It is what `jnp.einsum` says of x·W, whose error it raises where that is ambiguous.
    """
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands.values()]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None and out_sharding is None:
        return None
    x: Any = operands["x"]
    kernel: Any = operands.get("kernel")
    if kernel is None:  # A·B stands for W
        lora_a, lora_b = operands["lora_a"], operands["lora_b"]
        kernel = jax.ShapeDtypeStruct((lora_a.shape[0], lora_b.shape[1]), x.dtype)
        if mesh is not None:
            k, n = (jax.typeof(o).sharding.spec[at] for o, at in ((lora_a, 0), (lora_b, 1)))
            shared = {*partitioning.mesh_axes(k)} & {*partitioning.mesh_axes(n)}
            spec = PartitionSpec(k, None if shared else n)
            kernel = kernel.update(sharding=NamedSharding(mesh, spec))
    product = partial(jnp.einsum, "...k,kn->...n", out_sharding=out_sharding)
    # (`jax.eval_shape` says nothing of a mesh that has Auto axes, too.)
    sharding = jax.make_jaxpr(product)(x, kernel).out_avals[0].sharding
    if sharding.spec.unreduced:
        raise ValueError(
            f"out_sharding leaves sums over {sorted(sharding.spec.unreduced)} to the caller "
            "(unreduced), needed one that says where the result lies"
        )
    return sharding


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


def _check_reduced(operands: dict[str, Any]) -> None:
    """Refuses operands of which a gradient is to be left unreduced.

    XLA ends the process over a call of which one result is, and in a part with Auto axes it sums
    some and says that it did not: of x and of bias, jax 0.10.2 and 0.12.0.1.
    """
    for name, operand in operands.items():
        if over := jax.typeof(operand).sharding.spec.reduced:
            raise ValueError(
                f"{name} is reduced over {sorted(over)}, which would leave its gradient unreduced, "
                f"needed one that is not: pass jax.sharding.reshard({name}, jax.P(...)) to the op, "
                "whose gradient is then summed"
            )


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
