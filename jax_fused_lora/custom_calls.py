"""The two FFI calls on one device: which library and form, results, workspace and attributes.

`forward` and `backward` compute what `primitives` defines, on operands with batch axes in front and
row axes after those.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_fused_lora import batch, forms, reference
from jax_fused_lora.implementations import available_on, implementations, load, usable_cores
from jax_fused_lora.version import __version__


def forward(
    definition: Callable[..., Any],
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    *rest: jax.Array,
    platform: str,
    scaling: float,
    implementation: str | None,
) -> Any:
    """The two results, by custom call where one serves, else as `definition` has them."""
    sizes = _Sizes.of(x, lora_a, lora_b, rest[:1], *rest[1:])
    library, form = _route(forms.forward_form, platform, implementation, sizes, lora_b)
    if form == "xla":
        return definition(x, lora_a, lora_b, *rest, scaling=scaling, implementation=implementation)
    axes, m, k, n, r = sizes.axes, sizes.m, sizes.k, sizes.n, sizes.r
    x = x.reshape(*x.shape[:axes], m, k)
    operands = (x, lora_a, lora_b, *rest)
    if form == "base":
        operands = (*operands[:3], _base(axes, x, rest[0], 0), *rest[1:])
    few = library == "cpu" and form == "kernel" and sizes.product_rows <= _FEW_ROWS
    slices = _product_slices(k, n, x.dtype.itemsize) if few else 1
    floats = {
        "cpu": lambda: (
            _count(lora_a, axes) * r * k
            + _count(lora_b, axes) * r * _padded(n)
            + sum(_count(bias, axes) for bias in rest[1:]) * n
            + few * slices * sizes.products * sizes.product_rows * (n + _ROW_GAP)
        ),
        "metal": lambda: 0,
        "cuda": lambda: load("cuda").workspace(m, k, n, r, form, ""),
    }[library]()
    y, h, _ = jax.ffi.ffi_call(
        load(library).targets["lora_forward"],
        (
            jax.ShapeDtypeStruct((*sizes.batch, m, n), x.dtype),
            jax.ShapeDtypeStruct((*sizes.batch, m, r), jnp.float32),
            _workspace(floats),
        ),
        input_output_aliases=_in_place(form, operands, 3, (*sizes.batch, m, n)),
    )(*operands, scaling=np.float32(scaling), form=form, slices=np.int64(slices))
    return y.reshape(*sizes.batch, *sizes.rows, n), h.reshape(*sizes.batch, *sizes.rows, r)


def backward(
    definition: Callable[..., Any],
    g: jax.Array,
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    h: jax.Array,
    *rest: jax.Array,
    platform: str,
    scaling: float,
    grads: str,
    implementation: str | None,
) -> Any:
    """Those of dx, dA and dB that `grads` names, as `forward` has y and h."""
    sizes = _Sizes.of(g, lora_a, lora_b, rest, x, h)
    library, form = _route(forms.backward_form, platform, implementation, sizes, lora_b)
    if form == "xla":
        return definition(
            g, x, lora_a, lora_b, h, *rest,
            scaling=scaling, grads=grads, implementation=implementation,
        )  # fmt: skip
    axes, m, k, n, r = sizes.axes, sizes.m, sizes.k, sizes.n, sizes.r
    asked = grads
    if form == "dx":
        form = "kernel"
        # The elements of a batch share the workspace, and so keep no t.
        grads = "x" if "x" in asked and axes == 0 else asked
    g, x, h = (o.reshape(*o.shape[:axes], m, o.shape[-1]) for o in (g, x, h))
    operands = (g, x, lora_a, lora_b, h, *rest)
    if form == "base":
        operands = (*operands[:5], _base(axes, g, rest[0], 1))
    count = math.prod(sizes.batch)
    slices = _row_slices(m, r, form) if library == "cpu" and count == 1 else 1
    wide_b = lora_b.dtype == jnp.float32  # read where it lies, as dB is summed where it belongs
    sums = slices * (k + n) - wide_b * n if slices > 1 else 0
    turned = "x" in grads and form != "kernel"  # all of A; else block by block, as W is
    floats = {
        "cpu": lambda: (
            r * (count * m + sums)
            + turned * _count(lora_a, axes) * r * _padded(k)
            + (not wide_b) * _count(lora_b, axes) * r * n
        ),
        "metal": lambda: r * m,  # t
        "cuda": lambda: load("cuda").workspace(m, k, n, r, form, grads),
    }[library]()
    likes = {"x": x, "a": lora_a, "b": lora_b}
    *results, workspace = jax.ffi.ffi_call(
        load(library).targets["lora_backward"],
        (
            *(
                jax.ShapeDtypeStruct((*sizes.batch, *likes[w].shape[axes:]), likes[w].dtype)
                for w in grads
            ),
            _workspace(floats),
        ),
        input_output_aliases=_in_place(form, operands, 5, (*sizes.batch, m, k)),
    )(*operands, scaling=np.float32(scaling), form=form, grads=grads, slices=np.int64(slices))
    if "x" in grads:
        results[0] = results[0].reshape(*sizes.batch, *sizes.rows, k)
    left = [letter for letter in asked if letter not in grads]
    if "a" in left:
        t = workspace[: m * r].reshape(m, r)  # with which it begins
        results.append(reference.gradient_of_a(x, t, lora_a.dtype, split=True))
    if "b" in left:
        db = reference.gradient_of_b(g, h, lora_b.dtype, scaling=scaling, split=True)
        results.append(db)
    return tuple(results)


def decided_by() -> tuple[Any, ...]:
    """What decides on the calls of this process, beside their operands and parameters."""
    available = [name for name, each in implementations().items() if each.available]
    return __version__, available, usable_cores(), forms.metal_setting()


_FEW_ROWS = 8  # up to which slices of W are multiplied one by one on the CPU
_ROW_GAP = 16  # numbers between the rows of their sums
_MOST_AXES = 16  # of a batch, as native/calls.h has it


class _Sizes(NamedTuple):
    """Of a call: its batch and row axes, an element's sizes, and how often x·W is multiplied."""

    axes: int
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    m: int
    k: int
    n: int
    r: int
    products: int  # with a W of their own; 0 without W
    product_rows: int  # of each of them
    dtype: str

    @classmethod
    def of(
        cls,
        swept: jax.Array,
        lora_a: jax.Array,
        lora_b: jax.Array,
        kernel: Sequence[jax.Array],
        *others: jax.Array,
    ) -> "_Sizes":
        """`swept` is what W multiplies: x, or g; `kernel` has it, or nothing."""
        axes = lora_a.ndim - 2
        sizes = batch.full([swept, lora_a, lora_b, *kernel, *others], axes)
        rows = swept.shape[axes:-1]
        m, count = math.prod(rows), math.prod(sizes)
        (k, r), n = lora_a.shape[axes:], lora_b.shape[-1]
        shared = [_count(w, axes) == 1 and _count(swept, axes) in (1, count) for w in kernel]
        products = sum(1 if all_share else count for all_share in shared)
        product_rows = m * _count(swept, axes) if any(shared) else m
        return cls(axes, sizes, rows, m, k, n, r, products, product_rows, swept.dtype.name)


def _count(operand: jax.Array, axes: int) -> int:
    """Elements of a batch that have an operand of their own."""
    return math.prod(operand.shape[:axes])


def _route(
    rule: Callable[..., str],
    platform: str,
    implementation: str | None,
    sizes: _Sizes,
    lora_b: jax.Array,
) -> tuple[str, str]:
    """The native library that takes a call, and its form: "xla" where the definition does."""
    element = (sizes.product_rows, sizes.k, sizes.n, sizes.r)
    known = all(isinstance(size, int) for size in (*sizes.batch, *element))
    if not known or sizes.axes > _MOST_AXES:
        if implementation is not None:
            raise ValueError(
                f"implementation={implementation!r} needs sizes that are known when a program is "
                f"compiled, and at most {_MOST_AXES} batch axes: x is ({sizes.m}, {sizes.k}), B "
                f"({sizes.r}, {sizes.n}) and the batch {sizes.batch}; pass None or 'xla'"
            )
        return "", "xla"
    problem = forms.Problem(
        sizes.product_rows, sizes.k, sizes.n, sizes.r, sizes.dtype,
        has_kernel=sizes.products > 0, wide_b=lora_b.dtype != sizes.dtype,
        shared_kernel=sizes.products == 1 < math.prod(sizes.batch),
    )  # fmt: skip
    available = available_on(platform)
    library = implementation or forms.best_library(available, problem)
    if library not in available:
        return "", "xla"
    named = implementation is not None
    return library, rule(library, problem, product=load(library).product, named=named)


def _base(axes: int, rows: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """x·W (axis 0) or g·Wᵀ (axis 1) in float32, by XLA."""
    return batch.each(lambda x, w: reference.contract(x, w, -1, axis), axes, [rows, kernel])


def _in_place(
    form: str, operands: Sequence[jax.Array], index: int, result: tuple[int, ...]
) -> dict[int, int] | None:
    """Where the result may take the buffer of the base that it completes."""
    if form != "base" or operands[0].dtype != jnp.float32 or operands[index].shape != result:
        return None
    return {index: 0}


def _workspace(floats: int) -> jax.ShapeDtypeStruct:
    """Scratch memory as a result of the call: XLA plans it, nothing is allocated at run time."""
    return jax.ShapeDtypeStruct((floats,), jnp.float32)


def _padded(columns: int) -> int:
    """Columns of a factor packed in whole panels, 64 wide at most."""
    return -(-columns // 64) * 64


def _product_slices(k: int, n: int, itemsize: int) -> int:
    """Slices of k that sum x·W of few rows separately.

    A slice is a megabyte of W, read from end to end (a thread that reads half of every row instead
    looks up twice the pages: bfloat16, 1×2048→2048, 1.3 times the time). But every core has one
    from 128 KiB on: float32, 1×512→512 on Zen 4, 104 → 57 µs.
    """
    size = k * n * itemsize
    return max(1, min(max(size >> 20, min(size >> 17, usable_cores())), 16, k // 64))


def _row_slices(m: int, r: int, form: str) -> int:
    """Row slices that sum dA and dB separately: one a core, none of fewer than 32 rows.

    Else one, which takes no sums beside the result: dA and dB are then cut by columns, and the rows
    read again. Of fewer rows than here they are read from the second cache, and that takes as long.
    Without W, forward and backward, float32, more rows take longer with one (rank 16, 512×1024 1.58
    on 16 cores and 1.18 on 4, 2048×2048 1.59 and 1.23), and up to rank 16 fewer do, too (Zen 4, two
    cores, rank 8, 64 rows 77 µs with two and 97 with one, 128 rows 121 and 153, rank 16 119 and
    129, 197 and 224; rank 64 as long). With W, 256 to 2048 rows, ranks 8 to 64, one takes 1.00 to
    1.04 of the time on two cores, 0.97 to 1.04 on 4 and 0.92 to 1.05 on 16, where the sums would
    have 16 times the size of A and B; so only two cores have two.
    """
    cores = usable_cores()
    if form != "delta" and cores > 2:
        return 1
    fewest = 64 if form == "delta" and r <= 16 else 256
    return max(1, min(cores, m // 32)) if m >= fewest else 1
