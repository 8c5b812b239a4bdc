"""XLA's own pool runs the blocks of a call, and the calls themselves too."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
from programs import apply, make, without


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
import hashlib
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
    """A sum is taken in an order that the shape and the process's cores decide, not the threads.

    16 are what a server with so many cores has, and here may take turns on two: NPROC is XLA's.
    """
    digests = set()
    for threads in (1, 2, 16):
        done = subprocess.run(
            [sys.executable, "-c", INDEPENDENT_CALLS],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "NPROC": str(threads)},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
