"""Which native library and which form of its call serve a shape best: the one place of that rule.

On JAX's CPU platform a Mac has two libraries, "cpu" and "metal": see `best_library`.

The forms of a call that has a kernel W:

* "kernel": the native code computes x·W itself and adds the low-rank part as its last step;
* "base": XLA computes x·W in float32 and the call adds the low-rank part, in place where it can;
* "xla": no native code, the definition as XLA compiles it.

A call without W, "delta", is always native. On Metal the first form is the only one.

The limits of the CPU's forms were measured with `benchmarks/forms.py`, jax 0.10.2, layers 512 to
2048 wide, on two-core x86-64 servers: an Intel one with AVX-512 and AMX, an AMD one (Zen 3) with
AVX2. Where the two disagree a limit lies between them and costs either less than a tenth there.

The limits follow from how XLA multiplies: float32 reaches its speed at some hundred rows; 16-bit
types are widened, all of W, in every call. But where the CPU has AMX, bfloat16 runs on it from few
rows on, at up to four times our speed, and there the low-rank products are best left in the same
program until they are many enough for the saved sweeps to count.
"""

import functools
import os
import pathlib
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

METAL_MAX_RANK = 256

# Multiplications from which a call goes to the Apple GPU. A command buffer takes about 150 µs there
# and back, in which a Mac's CPU does some 3e7 of them; twice that is an estimate on the safe side,
# never measured: `python -m jax_fused_lora selftest` measures it.
_METAL_WORK = 1 << 26
_METAL_VARIABLE = "JAX_FUSED_LORA_METAL"


def best_library(
    available: Collection[str], rows: int, k: int, n: int, rank: int, *, has_kernel: bool
) -> str | None:
    """The one of `available`, libraries that serve JAX's CPU platform, for a call; None for XLA.

    The environment variable JAX_FUSED_LORA_METAL decides what Metal gets: "auto" (the default),
    calls with work enough to pay for a command buffer; "always"; or "never". It is read when a
    program is compiled.

    Raises:
        ValueError: the variable has another value.
    """
    setting = os.environ.get(_METAL_VARIABLE, "auto")
    if setting not in ("auto", "always", "never"):
        raise ValueError(f"{_METAL_VARIABLE} is {setting!r}, needed 'auto', 'always' or 'never'")
    work = rows * ((k * n if has_kernel else 0) + rank * (k + n))
    wanted = setting == "always" or (setting == "auto" and work >= _METAL_WORK)
    if "metal" in available and wanted and rank <= METAL_MAX_RANK:
        return "metal"
    return "cpu" if "cpu" in available else None


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


def forward_form(library: str, rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_forward`."""
    return _form(library, rows, _FORWARD[_kind(dtype)]) if has_kernel else "delta"


def backward_form(library: str, rows: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool) -> str:
    """The form of `lora_backward`."""
    return _form(library, rows, _BACKWARD[_kind(dtype)]) if has_kernel else "delta"


def widens_base(dtype: jax.typing.DTypeLike) -> bool:
    """Whether x and W are brought to float32 before XLA multiplies them, in form "base".

    The sums are the same. Asked for float32 sums of bfloat16, XLA without AMX is slower than with
    float32 operands: 512×1024→1024 on Zen 3, 13.1 ms against 8.5.
    """
    return not _kind(dtype).endswith("AMX")


def _form(library: str, rows: int, limits: _Limits) -> str:
    if library == "metal" or rows <= limits.kernel:
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
