"""Runs every kernel on sizes that divide nothing; the test of the emulator's own eyes.

    METAL_EMULATOR_SOURCE=shaders.metal python mutant.py

Prints "right", or "caught: " and what the emulator or the comparison with float64 says.
"""

import sys
from pathlib import Path

import emulator

emulator.load(emulator.BUILD / emulator.LIBRARY)
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import oracle  # noqa: E402

from jax_fused_lora import lora_forward, lora_linear  # noqa: E402

# Rows, in, out, rank: every kernel, several steps and threadgroups of each, more than one chunk of
# ranks, and sums that two simdgroups share.
SHAPES = [(70, 75, 90, 20), (5, 75, 90, 10), (70, 40, 30, 75), (35, 40, 70, 140)]
CASES = [(*shape, "float32") for shape in SHAPES] + [(*SHAPES[0], "bfloat16")]


def main() -> None:
    for case in CASES:
        for kernel in (True, False):
            rows, k, n, rank, dtype = case
            operands = oracle.operands((rows,), k, n, rank, dtype, kernel=kernel, bias=kernel)
            g = oracle.operands((rows,), n, 1, 1, dtype, seed=1)["x"]

            def op(operands):
                call = lora_linear if "kernel" in operands else lora_forward
                return call(**operands, scaling=0.5, implementation="metal")

            y, vjp = jax.vjp(op, operands)
            expected = oracle.truth(operands, g, 0.5)
            oracle.check("y", y, expected["y"], dtype)
            for name, gradient in vjp(g)[0].items():
                oracle.check(name, gradient, expected[name], dtype)


if __name__ == "__main__":
    try:
        main()
    except (jax.errors.JaxRuntimeError, ValueError, AssertionError) as error:
        print("caught:", str(error).strip().replace("\n", " "))
    else:
        print("right")
