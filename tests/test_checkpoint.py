"""`jax.checkpoint` and `jax.lax.scan`: what is kept, what is computed again, and memory."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import CLOSE, LINEAR, apply, calls, grads_asked, make, without

from jax_fused_lora import custom_calls, lora_linear


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
    monkeypatch.setattr(custom_calls, "usable_cores", lambda: cores)
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
