"""Meshes that operands do not lie on as the ops would have it: unnamed, mixed, or split in part.

Values and gradients against the unsharded truth in float64, on eight devices.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fused_lora import implementations, lora_forward, lora_linear

SCALING = 0.75
M, K, N, R = 16, 32, 48, 4
IMPLEMENTATIONS = [name for name in ("cpu", "cuda", "xla") if implementations()[name].available]
NATIVE = IMPLEMENTATIONS[0]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
REPLICATED = {name: P() for name in ("x", "kernel", "lora_a", "lora_b", "bias")}
COLUMN = REPLICATED | {
    "x": P("data"), "kernel": P(None, "model"), "lora_b": P(None, "model"), "bias": P("model"),
}  # fmt: skip
ROW = REPLICATED | {"x": P("data", "model"), "kernel": P("model"), "lora_a": P("model")}


def mesh_of(*axis_types, names=("data", "model")):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((4, 2), names, axis_types=axis_types)


def make(linear=True):
    return oracle.operands((M,), K, N, R, "float32", kernel=linear, bias=linear)


def put(operands, specs, mesh):
    return {n: jax.device_put(o, NamedSharding(mesh, specs[n])) for n, o in operands.items()}


def op(operands, implementation=NATIVE, **kwargs):
    function = lora_linear if "kernel" in operands else lora_forward
    return function(**operands, scaling=SCALING, implementation=implementation, **kwargs)


def check(y, grads):
    """Gradients of the sum of y."""
    truth = oracle.truth(make(), np.ones((M, N)), SCALING)
    if y is not None:
        oracle.check("y", y.reshape(M, N), truth["y"], "float32")
    for name, grad in grads.items():
        oracle.check(name, grad.reshape(truth[name][0].shape), truth[name], "float32")


def both(run, operands):
    """y, and the gradients of its sum."""
    (_, y), grads = jax.value_and_grad(lambda o: ((y := run(o)).sum(), y), has_aux=True)(operands)
    return y, grads


def collectives(function, *operands):
    text = jax.jit(function).lower(*operands).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= \S.*? ({kinds})(?:-start)?\(", text)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operands_that_lie_on_no_mesh_under_one(implementation, axis_type, jit):
    run = lambda operands: both(lambda o: op(o, implementation), operands)  # noqa: E731
    with jax.set_mesh(mesh_of(axis_type, axis_type)):
        check(*(jax.jit(run) if jit else run)(make()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_constraint_alone_names_the_mesh(implementation):
    rows = NamedSharding(mesh_of(AUTO, AUTO), P("data"))

    @jax.jit
    def run(operands):
        x = jax.lax.with_sharding_constraint(operands["x"], rows)
        return both(lambda o: op({**o, "x": x}, implementation), operands)

    y, grads = run(make())
    grads.pop("x")
    check(y, grads)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("rows", ["data", ("data", "model")], ids=["four", "eight"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_of_a_batch(implementation, rows, parts):
    """Gradient accumulation: rows over a part of a mesh axis, as a reshape leaves them."""
    mesh = mesh_of(AUTO, AUTO)
    operands = put(make(), REPLICATED | {"x": P(rows)}, mesh)

    @jax.jit
    def run(operands):
        split = lambda o: {**o, "x": o["x"].reshape(parts, -1, K)}  # noqa: E731
        return both(lambda o: op(split(o), implementation), operands)

    check(*run(operands))

    @jax.jit
    def accumulated(operands):
        x, rest = operands.pop("x"), operands
        step = lambda total, x: (  # noqa: E731
            jax.tree.map(jnp.add, total, jax.grad(lambda r: op({**r, "x": x}).sum())(rest)),
            None,
        )
        start = jax.tree.map(jnp.zeros_like, rest)
        return jax.lax.scan(step, start, x.reshape(parts, -1, K))[0]

    check(None, accumulated(operands))


@pytest.mark.parametrize("axis_types", [(EXPLICIT, AUTO), (AUTO, EXPLICIT)], ids=str)
@pytest.mark.parametrize("specs", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_axes_of_both_types(implementation, specs, axis_types):
    mesh = mesh_of(*axis_types)
    out = None
    if specs is ROW and axis_types[1] == EXPLICIT:
        out = NamedSharding(mesh, P(None, None))
    operands = put(make(), specs, mesh)
    run = lambda operands: both(  # noqa: E731
        lambda o: op(o, implementation, out_sharding=out), operands
    )
    y, grads = jax.jit(run)(operands)
    check(y, grads)
    for name, grad in grads.items():
        assert jax.typeof(grad).sharding == jax.typeof(operands[name]).sharding


@pytest.mark.parametrize("axis_types", [(EXPLICIT, EXPLICIT), (AUTO, EXPLICIT)], ids=str)
@pytest.mark.parametrize("specs", [REPLICATED | {"x": P("data")}, ROW], ids=["data", "row"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_on_a_mesh_that_is_set(implementation, specs, axis_types):
    """A device's part is traced while the user's Explicit axes are in force."""
    mesh = mesh_of(*axis_types)
    out = P(None, None) if specs is ROW else None
    with jax.set_mesh(mesh):
        operands = put(make(), specs, mesh)
        run = lambda o: both(lambda o: op(o, implementation, out_sharding=out), o)  # noqa: E731
        check(*jax.jit(run)(operands))


@pytest.mark.parametrize("name", [*REPLICATED, "scaling"])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_operands_with_gradients_to_be_left_unreduced_are_refused(implementation, name):
    """The process ended, or a gradient was summed twice."""
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    given = make() | {"scaling": jnp.float32(SCALING)}
    specs = {n: P() for n in given} | {"x": P("data"), name: P(reduced={"data"})}
    if name == "x":
        specs["x"] = P("data", reduced={"model"})
    operands = put(given, specs, mesh)
    with pytest.raises(ValueError, match=rf"{name} is reduced over .*reshard\({name}"):
        jax.jit(jax.grad(lambda o: lora_linear(**o, implementation=implementation).sum()))(operands)


def test_names_of_axes_are_the_users_own():
    """XLA ends the process over some that get into a program of ours: JAX 0.12's, over this one."""
    own = "β" if jax.__version_info__ >= (0, 12) else 'a "quoted" one'  # which JAX's own takes
    mesh = mesh_of(AUTO, AUTO, names=(own, "model"))
    operands = put(make(), REPLICATED | {"x": P(own)}, mesh)
    check(*jax.jit(lambda o: both(op, o))(operands))


def test_factors_of_one_layer_on_axes_that_overlap():
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    both_axes = ("data", "model")
    specs = {"x": P(None, both_axes), "lora_a": P(both_axes), "lora_b": P(None, "model")}
    operands = put(make(linear=False), specs, mesh)
    y = op(operands, out_sharding=NamedSharding(mesh, P(None, None)))
    truth = oracle.truth(make(linear=False), np.ones((M, N)), SCALING)
    oracle.check("y", y, truth["y"], "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_result_that_is_left_unreduced_is_refused(implementation):
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    operands = put(make(), ROW, mesh)
    out = NamedSharding(mesh, P("data", None, unreduced={"model"}))
    with pytest.raises(ValueError, match=r"sums over \['model'\] to the caller"):
        op(operands, implementation, out_sharding=out)


@pytest.mark.parametrize("axis_types", [(EXPLICIT, EXPLICIT), (AUTO, EXPLICIT)], ids=str)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_explicit_axes_around_a_shard_map(implementation, axis_types):
    mesh = mesh_of(*axis_types)
    operands = put(make(), COLUMN, mesh)

    def part(x, rest):
        return op({**rest, "x": x}, implementation)

    with jax.set_mesh(mesh):
        x = operands.pop("x")
        mapped = jax.shard_map(
            part, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
        )
        check(jax.jit(mapped)(x, operands), {})


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_a_constant_inside_a_shard_map(implementation):
    rest = make()
    x = np.asarray(rest.pop("x"))
    mapped = jax.shard_map(
        lambda rest: op({**rest, "x": x}, implementation),
        mesh=mesh_of(AUTO, AUTO), in_specs=P(), out_specs=P(), axis_names={"data"},
    )  # fmt: skip
    check(jax.jit(mapped)(rest), {})


@pytest.mark.parametrize(
    ("specs", "out"),
    [(ROW, P("data", "model")), (ROW | {"lora_b": P(None, "model")}, P("data"))],
    ids=["rows of y", "columns of B"],
)
def test_row_parallel_stays_so(specs, out):
    """Whatever else wants its axis: rows of the result (Megatron's sequence parallel), or B."""
    mesh = mesh_of(AUTO, AUTO)
    operands = make()
    operands["x"] = operands["x"].reshape(4, 4, K)
    operands = put(operands, specs | {"x": P("data", None, "model")}, mesh)
    forward = jax.jit(op, out_shardings=NamedSharding(mesh, out))
    check(forward(operands), {})
    kinds = collectives(forward, operands)
    assert kinds.count("all-reduce") == 1 and "all-to-all" not in kinds
    assert kinds.count("all-gather") == (specs is not ROW)  # of B


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_without_shardy(implementation):
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this JAX has no other partitioner")
    operands = put(make(), COLUMN, mesh_of(AUTO, AUTO))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        check(*jax.jit(lambda o: both(lambda o: op(o, implementation), o))(operands))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
