"""The ops on a mesh of eight devices: values, gradients, and what XLA sends between the devices.

The same operands, sharded every way that LoRA is trained in, on meshes with Auto and with Explicit
axes; against the unsharded truth in float64.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fused_lora.nnx as fused
from jax_fused_lora import implementations, lora_forward, lora_linear, partitioning

SCALING = 0.75
M, K, N, R = 16, 32, 48, 4
NAMES = ("x", "kernel", "lora_a", "lora_b", "bias")
IMPLEMENTATIONS = [name for name in ("cpu", "cuda", "xla") if implementations()[name].available]
NATIVE = IMPLEMENTATIONS[0]

# Of x, W, A, B and bias; and how often plain jax.numpy sums over devices, forward and with dx, dA
# and dB.
SHARDINGS = {
    "replicated": ((P(), P(), P(), P(), P()), (0, 0)),
    "data": ((P("data"), P(), P(), P(), P()), (0, 1)),
    "column": ((P(), P(None, "model"), P(), P(None, "model"), P("model")), (0, 1)),
    "row": ((P(None, "model"), P("model"), P("model"), P(), P()), (1, 1)),
    "data+column": ((P("data"), P(None, "model"), P(), P(None, "model"), P("model")), (0, 2)),
    "data+row": ((P("data", "model"), P("model"), P("model"), P(), P()), (1, 2)),
}
# What has to be gathered: W stored over the data's axis, and the rank, which is never split.
GATHERING = {
    "fsdp in": (P("data"), P("data"), P(), P(), P()),
    "fsdp out": (P("data"), P(None, "data"), P(), P(), P()),
    "rank": (P("data"), P(), P(None, "model"), P("model"), P()),
    "features of x alone": (P(None, "model"), P(), P(), P(), P()),
    "kernel alone": (P(), P("model"), P(), P(), P()),
    "crossed": (P(None, "model"), P(None, "model"), P(), P(None, "model"), P()),
}


def mesh_of(axis_type):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return mesh_of(request.param)


@pytest.fixture
def auto():
    return mesh_of(AxisType.Auto)


@pytest.fixture
def explicit():
    return mesh_of(AxisType.Explicit)


def make(linear=True, dtype="float32", rows=(M,)):
    return oracle.operands(rows, K, N, R, dtype, kernel=linear, bias=linear)


def cotangent(rows=(M,), dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*rows, N)), dtype)


def put(operands, specs, mesh):
    named = dict(zip(NAMES, specs, strict=True))
    return {
        name: jax.device_put(value, NamedSharding(mesh, named[name]))
        for name, value in operands.items()
    }


def spec_of_result(specs, mesh):
    """What a user says on an Explicit mesh, where einsum would ask."""
    asked = any(
        spec[at : at + 1] not in ((), (None,)) for spec, at in ((specs[0], 1), (specs[1], 0))
    )
    clash = specs[1][1:] == specs[0][:1]
    if mesh.axis_types[0] == AxisType.Auto or not (asked or clash):
        return None
    return NamedSharding(mesh, P(*specs[0][:1] or (None,), None))


def op(operands, implementation=NATIVE, out_sharding=None, scaling=SCALING):
    function = lora_linear if "kernel" in operands else lora_forward
    return function(
        **operands, scaling=scaling, implementation=implementation, out_sharding=out_sharding
    )


def with_gradients(operands, g, scaling=SCALING, **how):
    """What oracle.truth has, computed on a mesh."""

    def run(operands, scaling, g):
        y, vjp = jax.vjp(lambda o, s: op(o, scaling=s, **how), operands, scaling)
        d_operands, d_scaling = vjp(g)
        return {"y": y, **d_operands, "scaling": d_scaling}

    g = jax.device_put(g, jax.jit(lambda o: op(o, **how))(operands).sharding)
    return jax.jit(run)(operands, jnp.float32(scaling), g)


def check_all(results, truth, dtype):
    for name, result in results.items():
        # In 16 bits each device rounds its part before the parts are summed.
        own = "float32" if name == "scaling" else dtype
        oracle.check(name, result, truth[name], own, terms=dtype != "float32")


def collectives(text):
    """(result, kind) of each collective in compiled text."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text)


def calls(text, call):
    return len(re.findall(rf'custom_call_target="jax_fused_lora\.{NATIVE}\.{call}\b', text))


# ---- Values.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("name", [*SHARDINGS, *GATHERING])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, name, linear, dtype, mesh):
    specs = SHARDINGS[name][0] if name in SHARDINGS else GATHERING[name]
    given, g = make(linear, dtype), cotangent(dtype=dtype)
    how = {"implementation": implementation, "out_sharding": spec_of_result(specs, mesh)}
    results = with_gradients(put(given, specs, mesh), g, **how)
    check_all(results, oracle.truth(given, g, SCALING), dtype)
    for key in given:  # a gradient lies as its operand does
        if mesh.axis_types[0] == AxisType.Explicit:
            assert (
                results[key].sharding.spec[:1]
                == (*dict(zip(NAMES, specs, strict=True))[key], None)[:1]
            )


@pytest.mark.parametrize("wanted", [["lora_b"], ["scaling"], ["lora_a"], ["lora_a", "lora_b"]])
@pytest.mark.parametrize("rows", [(M,), (4, *(1,) * 10, M // 4)], ids=["a row axis", "twelve"])
def test_gradients_of_some_operands(wanted, rows, auto):
    """What no result has is summed over, however few and many the axes."""
    given, g = make(rows=rows), cotangent(rows)
    specs = (P("data"), P(None, "model"), P(), P(None, "model"), P("model"))
    operands = put(given, specs, auto) | {"scaling": jnp.float32(SCALING)}
    rest = {name: value for name, value in operands.items() if name not in wanted}

    def loss(trained, rest):
        everything = {**trained, **rest}
        scaling = everything.pop("scaling")
        return (op(everything, scaling=scaling) * g).sum()

    grads = jax.jit(jax.grad(loss))({name: operands[name] for name in wanted}, rest)
    check_all(grads, oracle.truth(given, g, SCALING), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_and_sequence_sharded_apart(implementation, mesh):
    """Rows that are two axes of x, each over a mesh axis of its own: neither is gathered."""
    given, g = make(rows=(4, 6)), cotangent((4, 6))
    specs = (P("data", "model"), P(), P(), P(), P())
    operands = put(given, specs, mesh)
    results = with_gradients(operands, g, implementation=implementation)
    check_all(results, oracle.truth(given, g, SCALING), "float32")
    assert results["y"].sharding.spec[:2] == ("data", "model")
    text = jax.jit(lambda o: op(o, implementation)).lower(operands).compile().as_text()
    assert collectives(text) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapters_of_a_sharded_batch(implementation, auto):
    """Many adapters under one W, each on the device that has its rows."""
    batch = NamedSharding(auto, P("data"))
    rng = np.random.default_rng(0)
    x, a, b, g = (
        jax.device_put(jnp.asarray(rng.normal(size=size), "float32"), batch)
        for size in ((8, 5, K), (8, K, R), (8, R, N), (8, 5, N))
    )
    w = jax.device_put(make()["kernel"], NamedSharding(auto, P()))

    @jax.jit
    def run(x, a, b, g):
        y, vjp = jax.vjp(
            jax.vmap(lambda x, a, b: lora_linear(x, w, a, b, implementation=implementation)),
            x, a, b,
        )  # fmt: skip
        return y, vjp(g)

    y, grads = run(x, a, b, g)
    assert collectives(run.lower(x, a, b, g).compile().as_text()) == []
    for i in range(8):
        each = {"x": x[i], "kernel": w, "lora_a": a[i], "lora_b": b[i]}
        truth = oracle.truth(each, g[i], 1.0)
        got = {"y": y[i]} | {n: d[i] for n, d in zip(("x", "lora_a", "lora_b"), grads, strict=True)}
        check_all(got, truth, "float32")


# ---- Programs.


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_nothing_is_gathered_and_no_more_summed_than_in_plain_jax(name, linear, dtype, mesh):
    specs, expected = SHARDINGS[name]
    out = spec_of_result(specs, mesh)
    operands = put(make(linear, dtype), specs, mesh)
    if not linear and name == "column":
        expected = (0, 1)
    frozen = {n: operands.pop(n) for n in ("kernel", "bias") if n in operands}
    for implementation in IMPLEMENTATIONS:

        def forward(trained, frozen, how=implementation):
            return op({**trained, **frozen}, how, out)

        def loss(trained, frozen, forward=forward):
            return (forward(trained, frozen) ** 2).mean(0)

        texts = [
            jax.jit(forward).lower(operands, frozen).compile().as_text(),
            jax.jit(lambda t, f, loss=loss: jax.vjp(lambda t: loss(t, f), t)[1](jnp.ones(N, dtype)))
            .lower(operands, frozen).compile().as_text(),
        ]  # fmt: skip
        for text, count in zip(texts, expected, strict=True):
            kinds = [kind for _, kind in collectives(text)]
            assert kinds == ["all-reduce"] * count, (implementation, collectives(text))
        if implementation == NATIVE:
            assert calls(texts[0], "lora_forward") == 1
            assert calls(texts[1], "lora_backward") == 1


@pytest.mark.parametrize("traced", [True, False], ids=["traced scaling", "scaling"])
@pytest.mark.parametrize("frozen", [("kernel", "bias"), ()], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", SHARDINGS)
def test_gradients_of_two_types_need_no_more_sums(name, frozen, traced, auto):
    """dW is summed in float32, and dB is float32 under a traced scaling, where x has 16 bits."""
    specs, (_, expected) = SHARDINGS[name]
    operands = put(make(dtype="float16"), specs, auto)
    rest = {n: operands.pop(n) for n in frozen}

    @jax.jit
    def run(trained, rest, scaling):
        scaling = scaling if traced else SCALING
        loss = lambda trained: (op({**trained, **rest}, scaling=scaling) ** 2).mean(0)  # noqa: E731
        return jax.vjp(loss, trained)[1](jnp.ones(N, "float16"))

    text = run.lower(operands, rest, jnp.float32(SCALING)).compile().as_text()
    assert [kind for _, kind in collectives(text)] == ["all-reduce"] * expected


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "forward"])
@pytest.mark.parametrize("name", ["data+column", "data+row"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_y_or_dx_is_summed_in_bfloat16(dtype, name, linear, mesh, monkeypatch):
    """Twice the bytes would take longer, and h or dA in another type be an all-reduce more.

    What is compiled for CPUs does not tell: there XLA sums bfloat16 in float32.
    """
    asked = []

    def spy(parts, over, dtype, real=partitioning._sum):
        asked.append(jnp.dtype(dtype).name)
        return real(parts, over, dtype)

    monkeypatch.setattr(partitioning, "_sum", spy)
    monkeypatch.setattr(partitioning, "_WIDE", 0)
    specs, (_, expected) = SHARDINGS[name]
    given, g = make(linear, dtype), cotangent(dtype=dtype)
    operands, how = put(given, specs, mesh), {"out_sharding": spec_of_result(specs, mesh)}
    check_all(with_gradients(operands, g, **how), oracle.truth(given, g, SCALING), dtype)
    large = "bfloat16" if dtype == "bfloat16" else "float32"
    assert set(asked) == {large, "float32"}  # y and h, or dx and dA; dA and dB over the rows

    @jax.jit
    def run(adapters, frozen, g):
        y, vjp = jax.vjp(lambda a: op({**a, **frozen}, **how), adapters)
        return y, vjp(g)

    adapters = {name: operands.pop(name) for name in ("x", "lora_a", "lora_b")}
    g = jax.device_put(g, jax.jit(lambda o: op(o, **how))({**adapters, **operands}).sharding)
    text = run.lower(adapters, operands, g).compile().as_text()
    assert [kind for _, kind in collectives(text)] == ["all-reduce"] * expected


def test_a_large_y_of_an_h_that_float16_cannot_hold(auto, monkeypatch):
    monkeypatch.setattr(partitioning, "_WIDE", 0)
    sizes = {"x": 1e3, "kernel": 1e-2, "lora_a": 1e2, "lora_b": 1e-4, "bias": 1.0}
    given = {name: value * sizes[name] for name, value in make(dtype="float16").items()}
    g = cotangent(dtype="float16") * 1e-3
    assert jnp.abs(given["x"].astype("float32") @ given["lora_a"].astype("float32")).max() > 1e5
    results = with_gradients(put(given, SHARDINGS["row"][0], auto), g)
    check_all(results, oracle.truth(given, g, SCALING), "float16")


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["in", "out"])
def test_fsdp_gathers_the_kernel_alone(spec, auto):
    """W lies in parts over the axis of the data; XLA gathers it where the fused call needs it."""
    specs = (P("data"), spec, P(), P(), P())
    operands = put(make(), specs, auto)
    run = jax.jit(op, out_shardings=NamedSharding(auto, P("data")))
    text = run.lower(operands).compile().as_text()
    assert calls(text, "lora_forward") == 1
    (result, kind), *others = collectives(text)
    assert (kind, others) == ("all-gather", [])
    assert re.match(r"f32\[32,48\]", result)


def test_fsdp_by_the_users_own_resharding(explicit):
    operands = put(make(), (P("data"), P("data"), P(), P(), P()), explicit)

    @jax.jit
    def run(operands):
        gathered = jax.sharding.reshard(operands["kernel"], NamedSharding(explicit, P()))
        return op({**operands, "kernel": gathered})

    text = run.lower(operands).compile().as_text()
    assert calls(text, "lora_forward") == 1
    assert [kind for _, kind in collectives(text)] == ["all-gather"]
    check_all({"y": run(operands)}, oracle.truth(make(), cotangent(), SCALING), "float32")


def test_a_sharding_on_the_rank_is_gathered(auto):
    operands = put(make(), GATHERING["rank"], auto)
    text = jax.jit(op).lower(operands).compile().as_text()
    assert {kind for _, kind in collectives(text)} == {"all-gather"}
    # A and B, nothing as large as x, W or y
    sizes = [np.prod([int(n) for n in re.search(r"\[(.*?)\]", r)[1].split(",")])
             for r, _ in collectives(text)]  # fmt: skip
    assert max(sizes) <= max(K, N) * R


def test_sizes_that_the_mesh_does_not_divide(auto):
    """XLA pads them; what it padded with must not be summed."""
    rng = np.random.default_rng(0)
    shapes = {"x": (7, 30), "kernel": (30, 9), "lora_a": (30, 3), "lora_b": (3, 9), "bias": (9,)}
    given = {name: jnp.asarray(rng.normal(size=size), "float32") for name, size in shapes.items()}
    g = jnp.asarray(rng.normal(size=(7, 9)), "float32")
    constrain = jax.lax.with_sharding_constraint
    specs = dict(zip(NAMES, SHARDINGS["data+row"][0], strict=True))

    @jax.jit
    def run(operands, g):
        def inner(operands):
            placed = {n: constrain(v, NamedSharding(auto, specs[n])) for n, v in operands.items()}
            return constrain(op(placed), NamedSharding(auto, P("data")))

        y, vjp = jax.vjp(inner, operands)
        return {"y": y, **vjp(g)[0]}

    check_all(run(given, g), oracle.truth(given, g, SCALING), "float32")


def test_a_number_stays_compiled_in(explicit):
    """As without a mesh: B is not multiplied by it, and keeps its dtype."""
    operands = put(make(dtype="bfloat16"), SHARDINGS["data"][0], explicit)
    text = jax.jit(op).lower(operands).as_text()
    assert "tensor<4x48xf32>" not in text


# ---- Errors.


@pytest.mark.parametrize("out_sharding", [None, P("data", "model"), P("nowhere"), P(None, "data")])
@pytest.mark.parametrize("name", ["row", "data+row", "data+column", "fsdp out"])
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "forward"])
def test_out_sharding_is_that_of_einsum(name, out_sharding, linear, explicit):
    """Its result's sharding, or its error."""
    specs = {**GATHERING, **{n: s for n, (s, _) in SHARDINGS.items()}}[name]
    if name == "fsdp out" and not linear:
        pytest.skip("has no W")

    def outcome(function):
        try:
            return jax.eval_shape(function).sharding.spec
        except Exception as error:
            return type(error), str(error).split(" This error occurs")[0]

    with jax.set_mesh(explicit):
        all_of_them = put(make(), specs, explicit)
        expected = outcome(
            lambda: jnp.einsum(
                "mk,kn->mn", all_of_them["x"], all_of_them["kernel"], out_sharding=out_sharding
            )
        )
        operands = {n: v for n, v in all_of_them.items() if linear or n not in ("kernel", "bias")}
        assert outcome(lambda: op(operands, out_sharding=out_sharding)) == expected
        assert outcome(lambda: op(operands, "xla", out_sharding=out_sharding)) == expected


def test_out_sharding_without_an_explicit_mesh(auto):
    with pytest.raises(ValueError, match="mesh context"):
        op(make(), out_sharding=P("data"))
    with jax.set_mesh(auto), pytest.raises(ValueError, match="Auto"):
        op(make(), out_sharding=P("data"))


# ---- Flax.


@pytest.mark.parametrize("wrapped", [False, True], ids=["LoRALinear", "LoRA"])
def test_flax_layers_take_out_sharding(wrapped, explicit):
    """Row parallel on an Explicit mesh, in one call; Flax's own adapter would ask for it."""
    rngs = nnx.Rngs(0)
    if wrapped:
        base = nnx.Linear(K, N, rngs=rngs)
        layer = fused.LoRA(K, R, N, base_module=base, implementation=NATIVE, rngs=rngs)
        parts = [(base.kernel, P("model")), (base.bias, P()), (layer.lora_a, P("model"))]
        lora_b = layer.lora_b
    else:
        layer = fused.LoRALinear(K, N, lora_rank=R, implementation=NATIVE, rngs=rngs)
        parts = [(layer.kernel, P("model")), (layer.bias, P()), (layer.lora.lora_a, P("model"))]
        lora_b = layer.lora.lora_b
    lora_b.set_value(make(False)["lora_b"])
    x = make()["x"]
    expected = layer(x)
    for parameter, spec in [*parts, (lora_b, P())]:
        parameter.set_value(jax.device_put(parameter[...], NamedSharding(explicit, spec)))
    x = jax.device_put(x, NamedSharding(explicit, P("data", "model")))

    run = nnx.jit(lambda layer, x: layer(x, out_sharding=NamedSharding(explicit, P("data"))))
    y = run(layer, x)
    assert y.sharding.spec[:1] == ("data",)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert calls(run.lower(layer, x).compile().as_text(), "lora_forward") == 1
