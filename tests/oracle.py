"""The rule of `jax_fused_lora.accuracy`, as the tests use it: a result that breaks it fails them.

The rule is in the package because `python -m jax_fused_lora selftest` holds to it too.
"""

import jax

from jax_fused_lora import accuracy
from jax_fused_lora.accuracy import DTYPES, NAMES, ROUNDING, SUMS, TINY, operands, truth

__all__ = ["DTYPES", "NAMES", "ROUNDING", "SUMS", "TINY", "check", "operands", "truth"]


def check(name: str, result: jax.Array, expected: tuple, dtype: str, *, terms=False) -> None:
    """Asserts that `result` is `expected` as closely as its dtype can hold; see `judge`."""
    problem = accuracy.judge(result, expected, dtype, terms=terms).problem
    assert not problem, f"{name} {problem}"
