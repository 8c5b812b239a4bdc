"""JAX's transformations of the ops: right values, and programs that do no more than they must.

What a program does is read from its text. Lowered text is what we asked XLA for; compiled text is
what XLA made of it.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_fused_lora import forms, lora_forward, lora_linear

SCALING = 0.75
LINEAR = ("x", "kernel", "lora_a", "lora_b", "bias")
# Two orders of the same float32 sums, several layers deep and relative to their largest result.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(params=["linear", "forward"])
def linear(request):
    """Whether the op under test is lora_linear with a bias, or lora_forward."""
    return request.param == "linear"


def apply(operands, implementation="cpu", scaling=SCALING):
    op = lora_linear if "kernel" in operands else lora_forward
    return op(**operands, scaling=scaling, implementation=implementation)


def make(rows, linear=True, k=24, n=40, r=4, seed=0):
    return oracle.operands(rows, k, n, r, "float32", kernel=linear, bias=linear, seed=seed)


def without(operands, name):
    return {key: value for key, value in operands.items() if key != name}


def check_all(results, expected):
    for name, result in results.items():
        oracle.check(name, result, expected[name], "float32")


def calls(text, call):
    """How often a program calls a CPU target, in lowered or compiled text."""
    return len(re.findall(rf'(?:@|custom_call_target=")jax_fused_lora\.cpu\.{call}\b', text))


def grads_asked(text):
    return re.findall(r'grads = "(\w*)"', text)


# ---- Gradients.


def test_grad_and_value_and_grad(implementation, linear):
    operands = make((6,), linear)
    g = make((6,), k=40, seed=1)["x"]
    expected = oracle.truth(operands, g, SCALING)

    def loss(operands, g):
        y = apply(operands, implementation)
        return (y * g).sum(), y

    grads, y = jax.grad(loss, has_aux=True)(operands, g)
    check_all(grads | {"y": y}, expected)
    (value, y), (again, d_g) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        operands, g
    )
    check_all(again | {"y": y}, expected)
    chex.assert_trees_all_equal(d_g, y)
    chex.assert_trees_all_close(value, (y * g).sum(), rtol=1e-5)


def subsets(names):
    counts = range(1, len(names) + 1)
    return list(chain.from_iterable(combinations(names, count) for count in counts))


@pytest.mark.parametrize("names", subsets(LINEAR), ids=",".join)
def test_only_the_gradients_asked_for_are_computed(names):
    """W is frozen in LoRA: its gradient, a product as large as the layer's own, must not appear."""
    operands = make((6,))

    def loss(wanted, rest):
        return apply({**wanted, **rest}).sum()

    wanted = {name: operands[name] for name in names}
    rest = {name: value for name, value in operands.items() if name not in names}
    text = jax.jit(jax.grad(loss)).lower(wanted, rest).as_text()
    letters = "".join({"x": "x", "lora_a": "a", "lora_b": "b"}.get(name, "") for name in LINEAR
                      if name in names)  # fmt: skip
    assert grads_asked(text) == ([letters] if letters else [])
    # So few rows have no product but the native one, save that of W's gradient, and h where y is
    # not asked for.
    of_h = len(re.findall(r"dot_general.*tensor<6x24xf32>, tensor<24x4xf32>", text))
    assert of_h == bool(letters)
    assert text.count("stablehlo.dot_general") == ("kernel" in names) + of_h
    assert text.count("stablehlo.reduce") == ("bias" in names)


def test_nothing_is_computed_for_a_result_that_is_not_used():
    operands = make((6,))

    def loss(operands):
        apply(operands)
        return (operands["x"] ** 2).sum()

    assert "jax_fused_lora" not in jax.jit(jax.grad(loss)).lower(operands).compile().as_text()


# ---- Forward mode, and derivatives of higher order.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jvp(implementation, linear, dtype):
    given = {name: value.astype(dtype) for name, value in make((6,), linear).items()}
    dots = {name: value.astype(dtype) for name, value in make((6,), linear, seed=1).items()}
    moved = jax.jvp(lambda o: apply(o, implementation), (given,), (dots,))[1]

    def truth(transform):
        with jax.enable_x64(True):
            wide = lambda tree: {k: jnp.asarray(transform(np.asarray(v, "float64")))  # noqa: E731
                                 for k, v in tree.items()}  # fmt: skip
            return np.asarray(jax.jvp(lambda o: apply(o, "xla"), (wide(given),), (wide(dots),))[1])

    oracle.check("y", moved, (truth(lambda v: v), truth(np.abs)), dtype)


def test_hessian_and_other_orders(implementation, linear):
    given = make((3,), linear, k=5, n=4, r=2)
    adapters = {name: given.pop(name) for name in ("lora_a", "lora_b")}

    def loss(adapters, implementation):
        return jnp.sin(apply({**given, **adapters}, implementation)).sum()

    of = partial(loss, implementation=implementation)
    wanted = jax.hessian(partial(loss, implementation="xla"))(adapters)
    for second in (
        jax.hessian(of),
        jax.jacrev(jax.jacrev(of)),
        jax.jacrev(jax.jacfwd(of)),
        jax.jacfwd(jax.jacfwd(of)),
    ):
        chex.assert_trees_all_close(second(adapters), wanted, **CLOSE)
    moved = jax.linearize(of, adapters)[1](adapters)
    _, expected = jax.jvp(partial(loss, implementation="xla"), (adapters,), (adapters,))
    chex.assert_trees_all_close(moved, expected, **CLOSE)


# ---- Export.


def exported(function, *operands, calls=("lora_forward", "lora_backward"), name="cpu"):
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_fused_lora.{name}.{call}")
        for call in calls
    ]
    whole = jax.export.export(jax.jit(function), disabled_checks=checks)(*operands)
    return jax.export.deserialize(whole.serialize())


def test_export(native, linear):
    """A program with the calls in it, serialized and run again."""
    operands = make((6,), linear)

    def run(operands):
        return jax.value_and_grad(lambda o: (apply(o, native) ** 2).sum())(operands)

    again = exported(run, operands, name=native)
    chex.assert_trees_all_close(again.call(operands), run(operands), **CLOSE)


def test_export_of_any_number_of_rows():
    """What is not known when a program is compiled is left to XLA, unless it is named."""
    operands = make((6,))
    rest = without(operands, "x")
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 24), jnp.float32)
    run = lambda x: apply({"x": x, **rest}, None)  # noqa: E731
    again = exported(run, x)
    chex.assert_trees_all_close(again.call(operands["x"]), run(operands["x"]), **CLOSE)
    with pytest.raises(ValueError, match=r"needs sizes that are known .*\(rows, 24\)"):
        exported(lambda x: apply({"x": x, **rest}, "cpu"), x)


# ---- Checkpoint and scan.


def test_checkpoint(implementation, linear):
    operands = make((6,), linear)

    def loss(operands):
        return (apply(operands, implementation) ** 2).sum()

    plain = jax.jit(jax.value_and_grad(loss))
    saving = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))
    chex.assert_trees_all_close(saving(operands), plain(operands), **CLOSE)
    if implementation == "cpu":
        text = saving.lower(operands).as_text()
        assert calls(text, "lora_forward") == 2  # h is not kept but computed again
        assert calls(text, "lora_backward") == 1


def test_a_policy_may_keep_h():
    """The residual has the name "lora_h"; kept, nothing computes it again."""
    operands = make((6,))

    def loss(operands):  # of a layer whose y nobody needs again
        return apply(operands).sum()

    def program(policy):
        checkpointed = jax.checkpoint(loss, policy=policy)
        run = lambda operands: jax.value_and_grad(checkpointed)(operands)  # noqa: E731
        return jax.jit(run).lower({n: operands[n] for n in LINEAR}).as_text()

    for policy, products in (
        (jax.checkpoint_policies.nothing_saveable, 1),
        (jax.checkpoint_policies.save_only_these_names("lora_h"), 0),
    ):
        text = program(policy)
        assert calls(text, "lora_forward") == 1
        of_h = re.findall(r"dot_general.*tensor<6x24xf32>, tensor<24x4xf32>", text)
        assert len(of_h) == products


def test_checkpoint_computes_no_y_that_is_not_needed_again(implementation):
    """Only h, as XLA would find in the definition; a call has no parts that it could drop."""
    operands = make((6,))
    adapters = {name: operands.pop(name) for name in ("lora_a", "lora_b")}

    def loss(adapters, operands):  # of what is added to the residual stream, say
        layer = lambda x: x + apply({**operands, "x": x, **adapters}, implementation)[:, :24]  # noqa: E731
        return jax.checkpoint(layer)(operands["x"]).sum()

    run = jax.jit(jax.value_and_grad(loss))
    plain = jax.value_and_grad(partial(loss, operands=operands))
    chex.assert_trees_all_close(run(adapters, operands), plain(adapters), **CLOSE)
    if implementation == "cpu":
        text = run.lower(adapters, operands).as_text()
        assert calls(text, "lora_forward") == 1
        assert grads_asked(text) == ["ab"]


def test_gradients_that_are_dropped_are_not_computed():
    """dx leaves the call, and W with it, where only scan or checkpoint learns that it is unused."""
    operands = make((6,))

    def loss(operands):
        return jax.checkpoint(lambda operands: (apply(operands) ** 2).sum())(operands)

    def run(operands):
        return jax.grad(loss)(operands)["lora_a"]

    jaxpr = jax.make_jaxpr(run)(operands)
    text = jax.jit(run).lower(operands).as_text()
    assert "lora_backward" in str(jaxpr)
    assert grads_asked(text) == ["a"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "tanh"])
@pytest.mark.parametrize("cores", [2, 64])
def test_memory_of_a_scan_under_checkpoint(cores, activation, dtype, monkeypatch):
    """No more than XLA needs for the same, nor a result of x's size that is not y or dx.

    But for the 64 bytes that XLA keeps for each custom call, a table of pointers to its results,
    where nothing else differs: docs/transformations.md names that.
    """
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    layers, rows, width, rank = 8, 512, 256, 8
    rng = np.random.default_rng(0)
    sizes = (layers, width, width), (layers, width, rank), (layers, rank, width), (rows, width)
    w, a, b, x = (jnp.asarray(rng.normal(size=size) / 16, dtype) for size in sizes)

    def compiled(implementation):
        def step(x, layer):
            w, a, b = layer
            y = lora_linear(x, w, a, b, implementation=implementation)
            return jnp.tanh(y) if activation == "tanh" else y, None

        def loss(adapters, x):
            return (jax.lax.scan(jax.checkpoint(step), x, (w, *adapters))[0] ** 2).sum()

        return jax.jit(jax.grad(loss)).lower((a, b), x).compile()

    native, xla = compiled("cpu"), compiled("xla")
    ours, theirs = (c.memory_analysis().temp_size_in_bytes for c in (native, xla))
    what = f"{dtype}, {activation}, {cores} cores"
    print(f"temporary memory, {what}: {ours} bytes, {theirs} of XLA's own")
    text = native.as_text()
    count = calls(text, "lora_forward") + calls(text, "lora_backward")
    assert count == (3 if activation == "tanh" else 2)
    alike = (activation, dtype) == ("tanh", "float32") or dtype == "bfloat16"  # of jax 0.10.2
    tables = 64 * count if alike else 0
    assert ours <= theirs + tables
    results = re.findall(r"= \((.*?)\) custom-call\(.*jax_fused_lora", text)
    assert len(results) == count
    for result in results:
        large = [
            shape
            for shape in re.findall(r"\[([\d,]+)\]", result)
            if np.prod([int(n) for n in shape.split(",")]) >= rows * width
        ]
        assert large == [f"{rows},{width}"]  # y, or dx


def stacked(layers, rows=6, width=24):
    """Square layers with a leading axis, small enough that a chain of them does not grow."""
    each = [without(make((rows,), k=width, n=width, seed=seed), "x") for seed in range(layers)]
    return jax.tree.map(lambda *leaves: 0.2 * jnp.stack(leaves), *each)


def scan_layers(layers, x, implementation):
    def step(x, layer):
        return jnp.tanh(apply({"x": x, **layer}, implementation)), None

    return jax.lax.scan(step, x, layers)[0]


def loop_layers(layers, x, implementation):
    for i in range(len(layers["bias"])):
        layer = {name: value[i] for name, value in layers.items()}
        x = jnp.tanh(apply({"x": x, **layer}, implementation))
    return x


def test_scan_over_stacked_layers(implementation):
    layers, x = stacked(4), make((6,))["x"]

    def value_and_grad(network, implementation):
        loss = lambda layers, x: (network(layers, x, implementation) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(layers, x)

    scanned = value_and_grad(scan_layers, implementation)
    chex.assert_trees_all_close(scanned, value_and_grad(loop_layers, "xla"), **CLOSE)


def test_scan_knows_that_the_kernels_are_frozen():
    layers, x = stacked(4), make((6,))["x"]
    adapters = {name: layers.pop(name) for name in ("lora_a", "lora_b")}

    def loss(adapters, layers, x):
        return scan_layers({**layers, **adapters}, x, "cpu").sum()

    text = jax.jit(jax.grad(loss)).lower(adapters, layers, x).as_text()
    assert grads_asked(text) == ["xab"]  # x of a layer is the result of the layer before
    assert "dot_general" not in text


# ---- vmap.


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmap_over_x(implementation, linear, axis):
    operands = make((3, 5), linear)
    rest = without(operands, "x")
    vmapped = jax.vmap(lambda x: apply({"x": x, **rest}, implementation), axis, axis)
    x = jnp.moveaxis(operands["x"], 0, axis)
    y = jnp.moveaxis(jax.jit(vmapped)(x), axis, 0)
    oracle.check("y", y, oracle.truth(operands, np.ones(y.shape), SCALING)["y"], "float32")


@pytest.mark.parametrize("rows", [(3, 2, 5), (3, 2), (0, 4)], ids=str)
def test_nested_vmap_over_x(implementation, linear, rows):
    """Of vectors as well, which have no rows but the batch; and of an empty batch."""
    operands = make(rows, linear)
    rest = without(operands, "x")
    y = jax.vmap(jax.vmap(lambda x: apply({"x": x, **rest}, implementation)))(operands["x"])
    oracle.check("y", y, oracle.truth(operands, np.ones(y.shape), SCALING)["y"], "float32")


def test_grad_of_vmap(implementation, linear):
    operands = make((3, 5), linear)
    g = make((3, 5), k=40, seed=1)["x"]

    def loss(operands):
        rest = without(operands, "x")
        return (
            jax.vmap(lambda x: apply({"x": x, **rest}, implementation))(operands["x"]) * g
        ).sum()

    check_all(jax.jit(jax.grad(loss))(operands), oracle.truth(operands, g, SCALING))


def test_vmap_of_grad(implementation, linear):
    """The gradients of each example, not of their sum."""
    operands = make((3, 5), linear)
    g = make((3, 5), k=40, seed=1)["x"]
    rest = without(operands, "x")

    def loss(rest, x, g):
        return (apply({"x": x, **rest}, implementation) * g).sum()

    each = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, 0, 0)))
    d_rest, d_x = each(rest, operands["x"], g)
    for i in range(3):
        got = {name: value[i] for name, value in d_rest.items()} | {"x": d_x[i]}
        check_all(got, oracle.truth({"x": operands["x"][i], **rest}, g[i], SCALING))


MAPPED = subsets(LINEAR)


@pytest.mark.parametrize("mapped", MAPPED, ids=",".join)
def test_vmap_over_weights(implementation, mapped):
    """Any subset of the operands, as many adapters under one W, or a W of each element."""
    each = [make((5,), seed=seed) for seed in range(3)]
    # Not all in the first axis.
    axes = {name: -1 if name in ("kernel", "lora_b") else 0 for name in mapped}
    batch = {
        name: jnp.stack([o[name] for o in each], axes[name]) if name in mapped else each[0][name]
        for name in LINEAR
    }
    g = make((5,), k=40, seed=9)["x"]

    def one(operands):
        y, vjp = jax.vjp(lambda operands: apply(operands, implementation), operands)
        return {"y": y, **vjp(g)[0]}

    results = jax.jit(jax.vmap(one, ({name: axes.get(name) for name in LINEAR},)))(batch)
    for i, other in enumerate(each):
        operands = {name: other[name] if name in mapped else each[0][name] for name in LINEAR}
        expected = oracle.truth(operands, g, SCALING)
        check_all({name: value[i] for name, value in results.items()}, expected)


@pytest.mark.parametrize("mapped", MAPPED, ids=",".join)
def test_grad_of_vmap_over_weights(implementation, mapped):
    """What elements share has one gradient, the sum of theirs."""
    each = [make((5,), seed=seed) for seed in range(3)]
    batch = {
        name: jnp.stack([o[name] for o in each]) if name in mapped else each[0][name]
        for name in LINEAR
    }
    g = jnp.stack([make((5,), k=40, seed=9 + i)["x"] for i in range(3)])
    axes = {name: 0 if name in mapped else None for name in LINEAR}

    def loss(operands):
        y = jax.vmap(lambda operands: apply(operands, implementation), (axes,))(operands)
        return (y * g).sum()

    grads = jax.jit(jax.grad(loss))(batch)
    truths = [
        oracle.truth({n: o[n] if n in mapped else each[0][n] for n in LINEAR}, g[i], SCALING)
        for i, o in enumerate(each)
    ]
    for name, gradient in grads.items():
        if name in mapped:
            for i, truth in enumerate(truths):
                oracle.check(name, gradient[i], truth[name], "float32")
        else:
            exact, bound = (sum(truth[name][at] for truth in truths) for at in (0, 1))
            oracle.check(name, gradient, (exact, bound), "float32")


def test_nested_vmap_over_adapters(implementation):
    """x mapped by one vmap and A and B by the other: neither is copied for the other."""
    x = make((2, 5))["x"]
    adapters = [make((5,), seed=seed) for seed in range(3)]
    a, b = (jnp.stack([o[name] for o in adapters]) for name in ("lora_a", "lora_b"))
    rest = {"kernel": adapters[0]["kernel"], "bias": adapters[0]["bias"]}

    def one(x, a, b):
        return apply({"x": x, "lora_a": a, "lora_b": b, **rest}, implementation)

    y = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))(x, a, b)
    assert y.shape == (2, 3, 5, 40)
    for i in range(2):
        for j in range(3):
            operands = {"x": x[i], "lora_a": a[j], "lora_b": b[j], **rest}
            truth = oracle.truth(operands, np.ones((5, 40)), SCALING)["y"]
            oracle.check("y", y[i, j], truth, "float32")


def test_vmap_over_scaling(implementation):
    operands = make((5,))
    scalings = jnp.array([0.5, -1.0, 2.0])

    def one(scaling):
        return jax.value_and_grad(lambda s: apply(operands, implementation, s).sum())(scaling)

    values, slopes = jax.jit(jax.vmap(one))(scalings)
    for i, scaling in enumerate(scalings):
        value, slope = one(scaling)
        chex.assert_trees_all_close((values[i], slopes[i]), (value, slope), rtol=1e-4)


@pytest.mark.parametrize("kernel", ["shared", "mapped"])
def test_many_adapters_are_one_call(kernel):
    """One W under many adapters: one call, forward and backward, and W as it lies."""
    layers = [make((5,), k=24, n=40, seed=seed) for seed in range(3)]
    stack = lambda name: jnp.stack([layer[name] for layer in layers])  # noqa: E731
    x, a, b = stack("x"), stack("lora_a"), stack("lora_b")
    w = stack("kernel") if kernel == "mapped" else layers[0]["kernel"]

    def loss(x, a, b, w):
        one = lambda x, a, b, w: lora_linear(x, w, a, b, implementation="cpu")  # noqa: E731
        return (jax.vmap(one, (0, 0, 0, 0 if kernel == "mapped" else None))(x, a, b, w) ** 2).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, a, b, w).compile().as_text()
    assert calls(text, "lora_forward") == 1
    assert calls(text, "lora_backward") == 1
    assert " while(" not in text
    assert ("f32[3,24,40]" in text) == (kernel == "mapped")


def test_gradients_of_shared_adapters_are_summed_in_the_call():
    """x alone is mapped: A's gradient is never one for each element."""
    operands = make((3, 5), k=24, n=40)
    rest = without(operands, "x")

    def loss(rest, x):
        return (jax.vmap(lambda x: apply({"x": x, **rest}))(x) ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(rest, operands["x"]).compile().as_text()
    assert calls(text, "lora_backward") == 1
    assert "f32[3,24,4]" not in text


def test_vmap_over_x_is_one_call_of_all_rows():
    """No loop over the batch, no copy of W for each of its elements."""
    operands = make((3, 5), k=24, n=40)
    vmapped = jax.jit(jax.vmap(apply, ({name: 0 if name == "x" else None for name in operands},)))
    text = vmapped.lower(operands).compile().as_text()
    assert calls(text, "lora_forward") == 1
    assert "f32[15,40]" in text
    assert " while(" not in text
    assert "f32[3,24,40]" not in text

    # The cotangent of the square is mapped as x is; that of the bare sum is not.
    for loss in (lambda y: (y**2).sum(), lambda y: y.sum()):

        def d_x(operands, loss=loss):
            one = lambda x: loss(apply({**operands, "x": x}))  # noqa: E731
            return jax.vmap(jax.grad(one))(operands["x"])

        text = jax.jit(d_x).lower(operands).compile().as_text()
        assert calls(text, "lora_backward") == 1
        assert " while(" not in text
        assert "f32[3,24,40]" not in text


# ---- The program.


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_base_product_is_completed_in_place(bias, monkeypatch):
    """Without AVX-512 XLA computes x·W and g·Wᵀ of many rows; the call adds to them in place."""
    monkeypatch.setattr(forms, "_cpu_flags", frozenset)
    operands = oracle.operands((700,), 64, 96, 4, "float32", bias=bias)
    g = make((700,), k=96)["x"]

    @jax.jit
    def run(operands, g):
        y, vjp = jax.vjp(lambda x: apply({**operands, "x": x}), operands["x"])
        return y, vjp(g)

    text = run.lower(operands, g).compile().as_text()
    assert re.findall(r"output_to_operand_aliasing=(\{.*?\)\})", text) == [
        "{{0}: (3, {})}",
        "{{0}: (5, {})}",
    ]
    entry = text[text.index("ENTRY") :]
    assert not re.search(r"= f32\[700,(64|96)\]\S* copy\(", entry)


def test_static_scaling_is_compiled_in():
    operands = make((6,), linear=False)
    traces = []

    def run(operands, scaling):
        traces.append(scaling)
        return apply(operands, scaling=scaling)

    run = jax.jit(run, static_argnames="scaling")
    once = run(operands, scaling=1.0)
    chex.assert_trees_all_equal(run(operands, scaling=2.0), 2 * once)
    chex.assert_trees_all_equal(run(operands, scaling=1.0), once)
    assert traces == [1.0, 2.0]
    assert "scaling = 2.0" in run.lower(operands, scaling=2.0).as_text()


def test_traced_scaling_is_not():
    operands = make((6,), linear=False)
    traces = []

    @jax.jit
    def run(operands, scaling):
        traces.append(scaling)
        return jax.value_and_grad(lambda s: apply(operands, scaling=s).sum())(scaling)

    one, slope = run(operands, 1.0)
    chex.assert_trees_all_close(run(operands, 3.0), (3 * one, slope), rtol=1e-5)
    assert len(traces) == 1


# ---- Threads. XLA's own pool runs the blocks of a call, and the calls themselves too.


def test_python_threads_share_the_pool():
    operands = make((120,), k=300, n=310, r=8)
    rest = without(operands, "x")
    xs = [make((120,), k=300, seed=seed)["x"] for seed in range(16)]
    run = jax.jit(jax.value_and_grad(lambda x: (apply({"x": x, **rest}) ** 2).sum()))
    alone = [run(x) for x in xs]
    with ThreadPoolExecutor(8) as threads:
        for together in threads.map(lambda _: [run(x) for x in xs], range(8)):
            chex.assert_trees_all_equal(together, alone)


# Calls that do not wait for one another, so that XLA may start them all at once: if a call waited
# for a block that no thread is left to take, this program would never end.
INDEPENDENT_CALLS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import jax, numpy as np, oracle
from jax_fused_lora import lora_forward, lora_linear

layers = [oracle.operands((64,), 512, 520, 8, "float32", seed=seed) for seed in range(16)]
many = [oracle.operands((400,), 512, 520, 8, "float32", kernel=False, bias=False, seed=seed)
        for seed in range(4)]

def loss(adapters, many):
    # Not the gradient of W: XLA's own product takes its sums in an order of the threads.
    linear = sum((lora_linear(**{**o, **a}, implementation="cpu") ** 2).sum()
                 for o, a in zip(layers, adapters))
    return linear + sum((lora_forward(**o, implementation="cpu") ** 2).sum() for o in many)

text = hashlib.sha256()
for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(
        [{n: o[n] for n in ("x", "lora_a", "lora_b")} for o in layers], many)):
    assert np.isfinite(leaf).all()
    text.update(np.asarray(leaf).tobytes())
print(text.hexdigest())
"""


def test_independent_calls_finish_with_the_same_bits_on_any_number_of_threads():
    """A sum is taken in an order that the shape and the machine decide, not the threads.

    16 are what a server with so many cores has, and here take turns on two: NPROC is XLA's.
    """
    digests = set()
    for cores, threads in ((1, 1), (2, 2), (2, 16)):
        done = subprocess.run(
            [sys.executable, "-c", INDEPENDENT_CALLS, str(cores)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "NPROC": str(threads)},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
