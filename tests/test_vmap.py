"""`jax.vmap` over any operand: right values, and programs that do no more than they must."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from programs import CLOSE, LINEAR, SCALING, apply, calls, check_all, make, subsets, without

from jax_fused_lora import lora_linear


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_grad_of_vmap_over_kernels_in_16_bits(implementation, dtype):
    """XLA's CPU client cannot run every product of 16 bits that it compiles."""
    operands = oracle.operands((64,), 128, 96, 8, dtype, bias=False)
    rest, kernels = without(operands, "kernel"), jnp.stack([operands["kernel"]] * 2)
    gs = make((2, 64), k=96)["x"].astype(dtype)

    @jax.jit
    def d_kernels(kernels, rest, gs):
        run = jax.vmap(lambda w: apply({"kernel": w, **rest}, implementation))
        return jax.vjp(run, kernels)[1](gs)[0]

    for grad, g in zip(d_kernels(kernels, rest, gs), gs, strict=True):
        oracle.check("kernel", grad, oracle.truth(operands, g, SCALING)["kernel"], dtype)


def test_more_batch_axes_than_a_call_takes_are_left_to_xla():
    operands = make((6,))
    run = lambda operands, implementation=None: apply(operands, implementation)  # noqa: E731
    for _ in range(17):
        operands = {name: value[None] for name, value in operands.items()}
        run = jax.vmap(run)
    got, expected = jax.jit(run)(operands), apply(make((6,)), "xla")
    chex.assert_trees_all_close(got.reshape(expected.shape), expected, **CLOSE)


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
