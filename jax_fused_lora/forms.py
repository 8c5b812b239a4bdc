"""Which form of a native call serves a shape best: the one place of that rule, by measurement.

The forms of a call that has a kernel W:

* "kernel": the native code computes x·W itself and adds the low-rank part as its last step;
* "base": XLA computes x·W in float32 and the call adds the low-rank part, in place where it can;
* "xla": no native code, the definition as XLA compiles it.

A call without W ("delta") is native or "xla".
"""

import jax

PLATFORMS = ("cpu",)  # those whose rule is here


def forward_form(
    m: int, k: int, n: int, r: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool
) -> str:
    """The form of `lora_forward` on the CPU: "delta", "kernel", "base" or "xla"."""
    if not has_kernel:
        return "delta"
    return "kernel" if m <= 64 else "base"


def backward_form(
    m: int, k: int, n: int, r: int, dtype: jax.typing.DTypeLike, *, has_kernel: bool
) -> str:
    """The form of `lora_backward` on the CPU: "delta", "kernel", "base" or "xla"."""
    if not has_kernel:
        return "delta"
    return "kernel" if m <= 16 else "base"
