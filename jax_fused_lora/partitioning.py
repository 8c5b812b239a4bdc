"""How the two calls run on a mesh: which axes each device keeps, and what is summed over devices.

A bare FFI call makes XLA's partitioner gather its operands. `custom_partitioning` tells it more: a
Shardy rule, by which shardings propagate through the call, and a function that takes what became of
that and says which part of the call each device computes. The parts of a call are calls
themselves, on slices:

* rows (data parallel) and batch axes: nothing is summed but dA and dB, over the axes of the rows;
* out_features (column parallel): dx and dA are summed;
* in_features (row parallel): the expand is linear, so each device runs the whole fused call on its
  slice; y and h are summed once, together, and one device adds the bias;
* the rank is never split: A and B are gathered.

A mesh axis that more than one of these want goes to the rows first, then to out_features and
in_features as W has them, W being the largest operand; so a W that is sharded for storage over the
axes of the data (FSDP) is gathered where it is used, and nothing else is. But one that both x and a
weight have on in_features stays there, though y be wanted with its rows on it (Megatron's sequence
parallel).
"""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

# XLA's shardings as JAX's. `custom_partitioning` would do that itself, but only for the mesh of the
# program's operands, which has no part of an axis and may not be there; nothing public does.
# Without it every sharded program fails, as test_partitioning.py would.
from jax._src.sharding_impls import parse_flatten_op_sharding  # isort: skip

from jax_fused_lora import batch, custom_calls

# Bytes of a device's y or dx in bfloat16 up to which it is summed in float32. Two H200s, bfloat16,
# rank 16, microseconds of a layer that sums y and h and does nothing else, in float32, in bfloat16,
# and each in its own type, in two all-reduces: y of 128 KiB 30, 29, 46; 512 KiB 40, 36, 50; 1 MiB
# 55, 41, 54; 2 MiB 62, 57, 53; 8 MiB 127, 92, 82; 64 MiB 593, 347, 350.
_WIDE = 512 << 10

Axes = tuple[str, ...]  # of a mesh
Factors = tuple[str, ...]  # what the axes of an operand or result stand for


class Call(NamedTuple):
    """What the axes of a call's operands and results stand for, after the batch axes.

    Attributes:
        operands: for each a string of "m", all rows, "k", "n" and "r"; the last may be absent.
        results: the same by the name that `grads` gives a result, for `lora_forward` "y" and "h".
        shard: a device's part: `shard(call, axes, operands, names)`, with the one-device call, the
            mesh axes of each factor, and the names of the results.
        prefer: (factor, operand) pairs; the first to have a free mesh axis for a factor gets it.
    """

    operands: tuple[str, ...]
    results: Mapping[str, str]
    shard: Callable[..., tuple[jax.Array, ...]]
    prefer: tuple[tuple[str, int], ...]


def partitioned(
    call: Call,
    on_one_device: Callable[..., Any],
    definition: Callable[..., Any],
    *operands: jax.Array,
    **params: Any,
) -> Any:
    """`on_one_device(*operands, **params)`, which on a mesh runs on each device's part.

    Inside a `shard_map` over some axes of a mesh only, `custom_partitioning` cannot say what
    becomes of the others, and without Shardy it has no rule: there XLA partitions the definition,
    or gathers the operands of a call that was asked for by name.
    """
    mesh = jax.typeof(operands[0]).sharding.mesh
    if mesh.empty:  # a constant's
        mesh = jax.sharding.get_abstract_mesh()
    shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
    if not shardy or 0 < len(mesh.manual_axes) < len(mesh.axis_names):
        some = definition if params["implementation"] is None else on_one_device
        return some(*operands, **params)
    batch_axes = operands[call.operands.index("kr")].ndim - 2
    names = params.get("grads", tuple(call.results))
    sizes_of_all = batch.full(operands, batch_axes)
    row_axes = operands[0].ndim - batch_axes - 1

    def factors(dims: str, sizes: Sequence[int], tag: str) -> Factors:
        """An axis of size 1 that others have more of is a factor of its own."""
        own = [f"b{i}" if size == sizes_of_all[i] else f"{tag}{i}" for i, size in enumerate(sizes)]
        rows = [f"m{i}" for i in range(row_axes)]
        return (*own, *(f for dim in dims for f in (rows if dim == "m" else [dim])))

    given = [
        factors(dims, operand.shape[:batch_axes], f"o{i}x")
        for i, (dims, operand) in enumerate(zip(call.operands, operands, strict=False))
    ]
    wanted = [factors(call.results[name], sizes_of_all, "") for name in names]

    def per_device(axes: Mapping[str, Axes]) -> Callable[..., Any]:
        def part(*parts: jax.Array) -> tuple[jax.Array, ...]:
            # Not on the user's mesh, whose Explicit axes would have a say in a device's part.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return call.shard(
                    lambda *parts: on_one_device(*parts, **params), axes, parts, names
                )

        return part

    whole = custom_partitioning(lambda *operands: tuple(on_one_device(*operands, **params)))
    kept = {factor for result in wanted for factor in result}
    # In the order in which the rule names them first, as Shardy asks.
    summed = dict.fromkeys(f for operand in given for f in operand if f not in kept)
    whole.def_partition(
        lambda own, args, results: _partition(
            call,
            _finest(mesh if own.empty else own, args[0].sharding.num_devices),
            _Placed.of(args, given),
            _Placed.of(results, wanted),
            per_device,
        ),
        decode_shardings=False,
        sharding_rule=f"{_rule(given)} -> {_rule(wanted)}",
        need_replication_factors=("r",),
        reduction_factors=tuple(f for f in summed if f in ("k", "n") or f[0] == "m"),
    )

    # Of `whole` a program holds an address alone, and nothing of params. So the name of what calls
    # it says them: JAX's persistent cache would take the program of another scaling for this one,
    # once the address came again (jax 0.12.0.1: 3 of 12 programs in one process).
    def named(*operands: jax.Array) -> Any:
        return whole(*operands)

    known = sorted(params.items()), tuple(mesh.shape.values()), custom_calls.decided_by()
    named.__name__ = f"lora_{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}"
    return jax.jit(named)(*operands)


def _rule(factors: Sequence[Factors]) -> str:
    return ", ".join(" ".join(each) for each in factors)


def mesh_axes(entry: str | tuple[str, ...] | None) -> Axes:
    """Those that one entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else entry or ()


class _Placed(NamedTuple):
    """An operand or result, as XLA would have it lie."""

    like: jax.ShapeDtypeStruct
    factors: Factors

    @classmethod
    def of(cls, likes: Sequence[Any], factors: Sequence[Factors]) -> "list[_Placed]":
        return [cls(like, each) for like, each in zip(likes, factors, strict=True)]

    def on(self, mesh: AbstractMesh) -> "_Placed":
        """With a sharding of that mesh; none where its axes cannot say how it lies."""
        try:
            (spec,) = parse_flatten_op_sharding(self.like.sharding._hlo_sharding, mesh)
        except (AssertionError, LookupError, NotImplementedError, StopIteration, ValueError):
            spec = PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        like = jax.ShapeDtypeStruct(self.like.shape, self.like.dtype, sharding=sharding)
        return self._replace(like=like)

    def asked(self, factor: str) -> Axes:
        """The mesh axes that a factor of it lies on."""
        spec, at = self.like.sharding.spec, self.factors.index(factor)
        return mesh_axes(spec[at] if at < len(spec) else None)


def _finest(mesh: Any, devices: int) -> AbstractMesh:
    """The mesh with its axes cut into primes, as XLA may split over a part of one (a reshape).

    A program whose operands lie on no mesh has none, or that of `jax.set_mesh`. The names are our
    own, as XLA ends the process over some (jax 0.12.0.1: over any letter that is not ASCII).
    """
    cut: dict[str, int] = {}
    for size in mesh.shape.values() if mesh.size == devices else [devices]:
        factor = 2
        while size > 1:
            while size % factor:
                factor += 1
            cut[str(len(cut))] = factor
            size //= factor
    return AbstractMesh(tuple(cut.values()), tuple(cut))


def _partition(
    call: Call,
    mesh: AbstractMesh,
    operands: Sequence[_Placed],
    results: Sequence[_Placed],
    per_device: Callable[[Mapping[str, Axes]], Callable[..., Any]],
) -> Any:
    """What `custom_partitioning` asks: the mesh, a device's part, and the shardings it needs."""
    operands = [placed.on(mesh) for placed in operands]
    results = [placed.on(mesh) for placed in results]
    axes = _assign(call, mesh, operands, results)

    def sharding(placed: _Placed) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axes.get(f) or None for f in placed.factors)))

    return mesh, per_device(axes), tuple(map(sharding, results)), tuple(map(sharding, operands))


def _assign(
    call: Call, mesh: AbstractMesh, operands: Sequence[_Placed], results: Sequence[_Placed]
) -> dict[str, Axes]:
    """The mesh axes of each factor, none of them twice; the same in every process."""
    axes: dict[str, Axes] = {}
    used: set[str] = set()

    def offer(factor: str, placed: _Placed, taken: Collection[str] = used) -> None:
        free = tuple(axis for axis in placed.asked(factor) if axis not in taken)
        size = placed.like.shape[placed.factors.index(factor)]
        # XLA pads uneven parts, and sums over what it padded with would be wrong.
        if free and not axes.get(factor) and size % _size(mesh, free) == 0:
            axes[factor] = free
            used.update(free)

    everything = (*operands, *results)
    in_features: dict[bool, set[str]] = {False: set(), True: set()}  # of x, and of W and A
    for placed in operands:
        if "k" in placed.factors:
            in_features["r" in placed.factors or "n" in placed.factors].update(placed.asked("k"))
    row_parallel = in_features[False] & in_features[True]
    for placed in everything:
        for factor in placed.factors:
            if factor[0] in "bm":
                offer(factor, placed, used | row_parallel)
    for factor, operand in call.prefer:
        if operand < len(operands):
            offer(factor, operands[operand])
    for placed in everything:
        for factor in placed.factors:
            if factor in ("k", "n"):
                offer(factor, placed)
    return axes


def _size(mesh: AbstractMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _forward_part(
    call: Callable[..., Any],
    axes: Mapping[str, Axes],
    operands: Sequence[jax.Array],
    names: Sequence[str],
) -> tuple[jax.Array, ...]:
    over = axes.get("k")
    if not over:
        return tuple(call(*operands))
    *others, bias = operands if len(operands) == len(FORWARD.operands) else (*operands, None)
    if bias is not None:
        others.append(jnp.where(jax.lax.axis_index(over) == 0, bias, jnp.zeros_like(bias)))
    y, h = call(*others)
    return _sum((y, h), over, _sum_dtype(y))


def _backward_part(
    call: Callable[..., Any],
    axes: Mapping[str, Axes],
    operands: Sequence[jax.Array],
    names: Sequence[str],
) -> tuple[jax.Array, ...]:
    results = dict(zip(names, call(*operands), strict=True))
    rows = tuple(axis for factor in sorted(axes) if factor[0] == "m" for axis in axes[factor])
    # dA in both, so that each is one all-reduce, as in plain jax.numpy. That over the rows has the
    # type that XLA sums the gradient of a trained W in, so that this can join.
    columns = _sum_dtype(results["x"]) if "x" in results else jnp.float32
    for over, summed, dtype in ((axes.get("n"), "xa", columns), (rows, "ab", jnp.float32)):
        some = [name for name in summed if name in results]
        if over and some:
            totals = _sum([results[name] for name in some], over, dtype)
            results |= zip(some, totals, strict=True)
    return tuple(results[name] for name in names)


def _sum(parts: Sequence[jax.Array], over: Axes, dtype: Any) -> tuple[jax.Array, ...]:
    """Of each part over those mesh axes, all in one type, since XLA sums each type by itself."""
    totals = jax.lax.psum(tuple(part.astype(dtype) for part in parts), over)
    return tuple(total.astype(part.dtype) for total, part in zip(totals, parts, strict=True))


def _sum_dtype(largest: jax.Array) -> Any:
    """Of a sum of y and h, or dx and dA, by what takes its time.

    float16 lacks float32's range, which a part of y, or h, may need.
    """
    own = largest.dtype == jnp.bfloat16 and largest.nbytes > _WIDE
    return jnp.bfloat16 if own else jnp.float32


FORWARD = Call(
    operands=("mk", "kr", "rn", "kn", "n"),
    results={"y": "mn", "h": "mr"},
    shard=_forward_part,
    prefer=(("n", 3), ("k", 3), ("n", 2), ("k", 1)),
)
BACKWARD = Call(
    operands=("mn", "mk", "kr", "rn", "mr", "kn"),
    results={"x": "mk", "a": "kr", "b": "rn"},
    shard=_backward_part,
    prefer=(("n", 5), ("k", 5), ("n", 3), ("k", 2)),
)
