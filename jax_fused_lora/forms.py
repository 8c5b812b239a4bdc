"""Which form of a native call serves a shape best: the one place of that rule, by measurement.

The forms of a call that has a kernel W:

* "kernel": the native code computes x·W itself and adds the low-rank part as its last step;
* "base": XLA computes x·W in float32 and the call adds the low-rank part, in place where it can;
* "xla": no native code, the definition as XLA compiles it.

A call without W, "delta", is always native.

The limits below were measured with `benchmarks/forms.py`, jax 0.10.2, layers 512 to 2048 wide, on
two-core x86-64 servers: an Intel one with AVX-512 and AMX, an AMD one (Zen 3) with AVX2. Where the
two disagree a limit lies between them and costs either less than a tenth there.

The limits follow from how XLA multiplies: float32 reaches its speed at some hundred rows; 16-bit
types are widened, all of W, in every call. But where the CPU has AMX, bfloat16 runs on it from few
rows on, at up to four times our speed, and there the low-rank products are best left in the same
program until they are many enough for the saved sweeps to count.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

PLATFORMS = ("cpu",)  # those whose rule is here


class _Limits(NamedTuple):
    kernel: int  # rows up to which the native product wins
    base: int  # rows from which XLA's product with the native low-rank part wins


_FORWARD = {
    "float32": _Limits(96, 97),
    "float16": _Limits(512, 513),
    "bfloat16": _Limits(512, 513),
    "bfloat16 on AMX": _Limits(16, 256),
}
_BACKWARD = {
    "float32": _Limits(64, 65),
    "float16": _Limits(128, 129),
    "bfloat16": _Limits(128, 129),
    "bfloat16 on AMX": _Limits(16, 96),
}


def forward_form(rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_forward` on the CPU."""
    return _form(rows, _FORWARD[_kind(dtype)]) if has_kernel else "delta"


def backward_form(rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_backward` on the CPU."""
    return _form(rows, _BACKWARD[_kind(dtype)]) if has_kernel else "delta"


def widens_base(dtype: jax.typing.DTypeLike) -> bool:
    """Whether x and W are brought to float32 before XLA multiplies them, in form "base".

    The sums are the same. Asked for float32 sums of bfloat16, XLA without AMX is slower than with
    float32 operands: 512×1024→1024 on Zen 3, 13.1 ms against 8.5.
    """
    return not _kind(dtype).endswith("AMX")


def _form(rows: int, limits: _Limits) -> str:
    if rows <= limits.kernel:
        return "kernel"
    return "base" if rows >= limits.base else "xla"


def _kind(dtype: jax.typing.DTypeLike) -> str:
    name = jnp.dtype(dtype).name
    return f"{name} on AMX" if name == "bfloat16" and _has_amx() else name


@functools.cache
def _has_amx() -> bool:
    """Whether the CPU multiplies tiles of bfloat16, and Linux lets programs use it."""
    try:
        return "amx_bf16" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
