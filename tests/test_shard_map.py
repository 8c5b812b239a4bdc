"""The ops inside `shard_map`, where each device runs a program of its own, and inside `pmap`.

A `custom_vjp` would hide from JAX that each device computes a part of the gradient of replicated
adapters: before operands were made to vary alike, one device's part passed for the whole, without
an error.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_fused_lora import implementations, lora_forward, lora_linear

NATIVE = "cuda" if implementations()["cuda"].available else "cpu"
M, K, N, R = 16, 32, 48, 4
NAMES = ("x", "kernel", "lora_a", "lora_b", "bias")


def close(got, expected, name=""):
    """Two orders of the same float32 sums, relative to the largest result."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5 * scale, err_msg=name)


@pytest.fixture
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make(adapters=None):
    given = oracle.operands((M,), K, N, R, "float32")
    if adapters:  # as many different ones, stacked
        for name in ("lora_a", "lora_b"):
            given[name] = jnp.stack([given[name] * (1 + i) / 4 for i in range(adapters)])
    return [given[name] for name in NAMES]


def layer(x, w, a, b, bias, implementation):
    return jnp.sin(lora_linear(x, w, a, b, bias=bias, scaling=0.5, implementation=implementation))


def of_one_device(x, w, a, b, bias, *, implementation, adapters):
    if adapters == "sharded":  # this device's own
        a, b = a[0], b[0]
    return jax.lax.psum(layer(x, w, a, b, bias, implementation).sum(), "data")


@pytest.mark.parametrize("adapters", ["replicated", "sharded"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("taken", ["outside", "inside"])
def test_gradients(mesh, taken, check_vma, adapters):
    """Of every operand; of what is replicated they are sums over the devices."""
    if taken == "inside" and not check_vma:
        pytest.skip("without check_vma JAX itself leaves each device its part")
    own = P("data") if adapters == "sharded" else P()
    specs = (P("data"), P(), own, own, P())
    operands = make(4 if adapters == "sharded" else None)
    everything = tuple(range(5))

    def gradients(implementation):
        loss = partial(of_one_device, implementation=implementation, adapters=adapters)
        mapped = partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma)
        if taken == "outside":
            return jax.jit(jax.grad(mapped(loss, out_specs=P()), everything))(*operands)
        return jax.jit(mapped(jax.grad(loss, everything), out_specs=specs))(*operands)

    def whole(*operands):
        x, w, a, b, bias = operands
        if adapters == "replicated":
            return layer(x, w, a, b, bias, "xla").sum()
        parts = x.reshape(4, M // 4, K)
        return sum(layer(parts[i], w, a[i], b[i], bias, "xla").sum() for i in range(4))

    expected = jax.grad(whole, everything)(*operands)
    for name, got, wanted in zip(NAMES, gradients(NATIVE), expected, strict=True):
        close(got, wanted, name)


def test_tensor_parallel_by_hand(mesh):
    """Row parallel: a part of in_features on each device, summed by the user's own psum."""
    x, w, a, b, _ = make()
    specs = (P("data", "model"), P("model"), P("model"), P())

    def part(x, w, a, b):
        return jax.lax.psum(lora_linear(x, w, a, b, implementation=NATIVE), "model")

    mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"))
    loss = lambda f: lambda *o: jnp.sin(f(*o)).sum()  # noqa: E731
    plain = partial(lora_linear, implementation="xla")
    got = jax.jit(jax.value_and_grad(loss(mapped), (0, 1, 2, 3)))(x, w, a, b)
    expected = jax.value_and_grad(loss(plain), (0, 1, 2, 3))(x, w, a, b)
    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("implementation", [None, NATIVE, "xla"])
def test_over_some_axes_of_a_mesh_only(mesh, implementation):
    """The others are left to XLA: right, and where nothing was asked for by name not gathered."""
    x, w, a, b, bias = make()
    x = jax.device_put(x, jax.NamedSharding(mesh, P("data", "model")))
    w = jax.device_put(w, jax.NamedSharding(mesh, P("model")))
    mapped = jax.jit(
        jax.shard_map(
            partial(layer, implementation=implementation),
            mesh=mesh, in_specs=(P("data"), P(), P(), P(), P()), out_specs=P("data"),
            axis_names={"data"},
        )
    )  # fmt: skip
    close(mapped(x, w, a, b, bias), layer(x, w, a, b, bias, "xla"))
    text = mapped.lower(x, w, a, b, bias).compile().as_text()
    assert bool(re.search(r" all-gather(-start)?\(", text)) == (implementation == NATIVE)


@pytest.mark.parametrize("implementation", [None, NATIVE, "xla"])
def test_vmap_over_an_axis_of_the_mesh(mesh, implementation):
    """Of x alone, which so varies over one more axis than the weights that it meets."""
    x, w, a, b, _ = make()
    layer = lambda x, w, a, b: lora_linear(x, w, a, b, implementation=implementation)  # noqa: E731
    mapped = jax.shard_map(
        layer, mesh=mesh, in_specs=(P(), P(None, "model"), P(), P(None, "model")),
        out_specs=P(None, "model"),
    )  # fmt: skip
    each = jax.vmap(mapped, in_axes=(0, None, None, None), spmd_axis_name="data")
    loss = lambda f: lambda x, *rest: jnp.sin(f(x.reshape(4, M // 4, K), *rest)).sum()  # noqa: E731
    got = jax.jit(jax.value_and_grad(loss(each), (0, 1, 2, 3)))(x, w, a, b)
    plain = partial(lora_linear, implementation="xla")
    jax.tree.map(close, got, jax.value_and_grad(loss(plain), (0, 1, 2, 3))(x, w, a, b))


def test_pmap():
    """Legacy, and simply works."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    x, _, a, b, _ = make()

    def loss(a, x):
        return (lora_forward(x, a, b, implementation=NATIVE) ** 2).sum()

    parts = jax.pmap(jax.value_and_grad(loss), in_axes=(None, 0))(a, x.reshape(8, 2, K))
    got = jax.tree.map(lambda part: part.sum(0), parts)
    jax.tree.map(close, got, jax.value_and_grad(loss)(a, x))


def test_export(mesh):
    """A program of several devices, which one partitioned by `jit` could not be."""
    x, w, a, b, bias = make()
    mapped = jax.shard_map(
        partial(layer, implementation=NATIVE),
        mesh=mesh, in_specs=(P("data"), P(), P(), P(), P()), out_specs=P("data"),
    )  # fmt: skip
    check = jax.export.DisabledSafetyCheck.custom_call(f"jax_fused_lora.{NATIVE}.lora_forward")
    x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    whole = jax.export.export(jax.jit(mapped), disabled_checks=[check])(x, w, a, b, bias)
    again = jax.export.deserialize(whole.serialize())
    close(again.call(x, w, a, b, bias), layer(x, w, a, b, bias, "xla"))
