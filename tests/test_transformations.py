"""JAX's transformations of the ops: right values, and programs that do no more than they must.

What a program does is read from its text. Lowered text is what we asked XLA for; compiled text is
what XLA made of it.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_fused_lora import lora_forward, lora_linear

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
    # So few rows have no product but the native one, save that of W's gradient.
    assert text.count("stablehlo.dot_general") == ("kernel" in names)
    assert text.count("stablehlo.reduce") == ("bias" in names)


def test_nothing_is_computed_for_a_result_that_is_not_used():
    operands = make((6,))

    def loss(operands):
        apply(operands)
        return (operands["x"] ** 2).sum()

    assert "jax_fused_lora" not in jax.jit(jax.grad(loss)).lower(operands).compile().as_text()


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


@pytest.mark.parametrize(
    "mapped",
    [("lora_a",), ("lora_a", "lora_b"), ("x", "lora_a", "lora_b"), ("x", "kernel"), LINEAR],
    ids=",".join,
)
def test_vmap_over_weights(implementation, mapped):
    """An adapter for each element of the batch, say."""
    each = [make((5,), seed=seed) for seed in range(3)]
    batch = {n: jnp.stack([o[n] for o in each]) if n in mapped else each[0][n] for n in LINEAR}
    axes = {name: 0 if name in mapped else None for name in LINEAR}
    g = make((5,), k=40, seed=9)["x"]

    def one(operands):
        y, vjp = jax.vjp(lambda operands: apply(operands, implementation), operands)
        return {"y": y, **vjp(g)[0]}

    results = jax.jit(jax.vmap(one, (axes,)))(batch)
    for i, other in enumerate(each):
        operands = {name: other[name] if name in mapped else each[0][name] for name in LINEAR}
        expected = oracle.truth(operands, g, SCALING)
        check_all({name: value[i] for name, value in results.items()}, expected)


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
def test_base_product_is_completed_in_place(bias):
    """With many rows XLA computes x·W and g·Wᵀ, and the call adds to them where they lie."""
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
    """A sum is taken in an order that the shape alone decides."""
    digests = set()
    for cores in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", INDEPENDENT_CALLS, str(cores)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
