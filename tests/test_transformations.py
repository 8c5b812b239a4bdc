"""Derivatives and exports of the ops: right values, and programs that do no more than they must."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from programs import CLOSE, LINEAR, SCALING, apply, check_all, grads_asked, make, subsets, without

from jax_fused_lora import forms

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


# ---- Without jit.


def test_calls_outside_of_jit_are_compiled_once(linear):
    compiled = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            compiled.append(event)

    def step(seed):
        operands = make((6,), linear, seed=seed)
        return jax.value_and_grad(lambda o: apply(o).sum())(operands)

    step(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        step(1)
        assert compiled == []
        jax.jit(lambda x: x + 1)(1)
        assert compiled, "the listener hears what is compiled"
    finally:
        jax.monitoring.clear_event_listeners()


def test_jit_may_be_disabled(implementation, linear):
    operands = make((6,), linear)
    run = jax.value_and_grad(lambda o: apply(o, implementation).sum())
    with jax.disable_jit():
        got = run(operands)
    chex.assert_trees_all_close(got, jax.jit(run)(operands), **CLOSE)


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


@pytest.mark.parametrize("shared", ["kernel", ""])
def test_export_of_any_number_of_adapters(shared):
    operands = {name: np.stack([value] * 3) for name, value in make((6,)).items()}
    if shared:
        operands[shared] = operands[shared][0]
    (count,) = jax.export.symbolic_shape("count")
    axes = {name: None if name == shared else 0 for name in operands}

    def run(operands):
        loss = lambda o: (apply(o, None) ** 2).sum()  # noqa: E731
        return jax.vmap(jax.value_and_grad(loss), (axes,))(operands)

    shapes = {
        name: jax.ShapeDtypeStruct((count, *o.shape[1:]) if axes[name] == 0 else o.shape, o.dtype)
        for name, o in operands.items()
    }
    got, expected = exported(run, shapes).call(operands), run(operands)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-2)  # gradients up to 1000


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
