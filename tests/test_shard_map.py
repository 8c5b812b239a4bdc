"""Gradients of replicated adapters inside `shard_map` are sums over the devices.

A `custom_vjp` hides from JAX that each device computes a part of them. Before operands were made
to vary alike, `check_vma=True` let one device's part pass for the whole, without an error.
"""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import jax_fused_lora as f

mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 4)
shapes = (8, 16), (16, 12), (16, 4), (4, 12)
operands = [jax.random.normal(k, s) for k, s in zip(keys, shapes)]

def loss(*operands, **kwargs):
    return (f.lora_linear(*operands, **kwargs) ** 2).sum()

want = jax.grad(lambda *o: loss(*o, implementation="xla"), (0, 1, 2, 3))(*operands)
for check_vma in (True, False):
    mapped = jax.shard_map(
        lambda *o: jax.lax.psum(loss(*o, implementation="cpu"), "d"),
        mesh=mesh, in_specs=(P("d"), P(), P(), P()), out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.grad(mapped, (0, 1, 2, 3)))(*operands)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-3)
print("right")
"""


def test_gradients_of_replicated_adapters():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "right\n", run.stderr
