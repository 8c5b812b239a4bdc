"""Which form of a native call serves a shape best: the one place of that rule, by measurement.

The forms of a call that has a kernel W:

* "kernel": the native code computes x·W itself and adds the low-rank part as its last step;
* "base": XLA computes x·W in float32 and the call adds the low-rank part, in place where it can;
* "xla": no native code, the definition as XLA compiles it.

A call without W, "delta", is always native.

The limits below were measured on a two-core x86-64 server with AVX-512 and AMX, jax 0.10.2 and
0.12.0, layers 256 to 2048 wide. They follow from how XLA multiplies there: float32 reaches its
speed at some hundred rows; float16 is widened, all of W, in every call; bfloat16 runs on AMX from
few rows on, at up to four times our speed, and there the low-rank products are best left in the
same program until they are many enough for the saved sweeps to count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PLATFORMS = ("cpu",)  # those whose rule is here


class _Limits(NamedTuple):
    kernel: int  # rows up to which the native product wins
    base: int  # rows from which XLA's product with the native low-rank part wins


_FORWARD = {
    "float32": _Limits(128, 129),
    "float16": _Limits(512, 513),
    "bfloat16": _Limits(16, 256),
}
_BACKWARD = {
    "float32": _Limits(64, 65),
    "float16": _Limits(64, 65),
    "bfloat16": _Limits(16, 96),
}


def forward_form(rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_forward` on the CPU."""
    return _form(rows, _FORWARD[jnp.dtype(dtype).name]) if has_kernel else "delta"


def backward_form(rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_backward` on the CPU."""
    return _form(rows, _BACKWARD[jnp.dtype(dtype).name]) if has_kernel else "delta"


def _form(rows: int, limits: _Limits) -> str:
    if rows <= limits.kernel:
        return "kernel"
    return "base" if rows >= limits.base else "xla"
