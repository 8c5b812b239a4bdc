"""Which native library and which form of its call serve a shape best: the one place of that rule.

A platform may have two libraries, as JAX's CPU platform on a Mac has "cpu" and "metal": see
`best_library`.

The forms of a call that has a kernel W:

* "kernel": the native code computes x·W itself and adds the low-rank part as its last step;
* "base": XLA computes x·W in float32 and the call adds the low-rank part, in place where it can;
* "dx": of the backward pass on CUDA, "kernel" for dx; dA and dB are XLA's, from the t of the call;
* "xla": no native code, the definition as XLA compiles it.

A call without W is "delta", or "xla" for many rows of rank 1 on CPUs and for much on CUDA. On Metal
"kernel" is the only form with W; on CUDA it is the one for few rows, and for any number where the
library has a product of its own.

The limits of the CPU's forms were measured with `benchmarks/forms.py`, layers 512 to 2048 wide, on
two-core x86-64 servers, with jax 0.10.2 unless said: Intel ones with AVX-512 and AMX, AMD ones with
AVX2 (Zen 3) and with AVX-512. Where two disagree a limit lies between them and costs either less
than a tenth there.

The limits follow from how XLA multiplies: float32 reaches its speed at some hundred rows; 16-bit
types are widened, all of W, in every call. With AVX-512 our product is ahead at any number of rows:
in float32 (512 to 2048 rows, layers of 512 to 4096, forward alone and with the backward pass) it
takes 0.90 to 0.96 of "base", in float16 (64 to 2048 rows of 1024 and 2048) 0.4 to 0.78 forward and
0.43 to 0.93 with the backward pass. With AVX2 it takes 0.65 to 0.96 of "base" in 16 bits forward
(256 to 2048 rows of 1024 and 2048) and 0.84 to 1.02 with the backward pass; in float32 either is
ahead, by some percent, and by up to a quarter where the machine is unsteady. Where the CPU has
instructions for bfloat16 XLA uses them, since jax 0.11.2 in any product, and so does ours:
AVX-512's (BF16) and AMX. With them it takes, rank 16, of the plain formula's time and (in
parentheses) "base" takes: on Zen 4, jax 0.12.0.1, 64 rows of 1024 0.83 (0.90), 512 rows 0.93
(0.95), with the backward pass 0.76 to 0.83 (0.85), 2048 rows of 2048 0.89 to 1.00 (0.99); with AMX,
jax 0.11.2, on 16 cores, 64 rows of 1024 0.47 (0.77), 512 rows 0.56 (0.70), with the backward pass
0.65 (0.82), 2048 rows of 2048 0.81 (0.81); on two of these, which vary by a third, 0.96 (0.90),
0.82 (0.99), 0.99 (0.84), and 512 rows of 2048 0.99 (0.95).
"""

import functools
import os
import pathlib
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_RANK = {"metal": 256, "cuda": 256}  # of the libraries that have one

# Multiplications from which a call goes to the Apple GPU. A command buffer takes about 150 µs there
# and back, in which a Mac's CPU does some 3e7 of them; twice that is an estimate on the safe side,
# never measured: `python -m jax_fused_lora selftest` measures it.
_METAL_WORK = 1 << 26
_METAL_VARIABLE = "JAX_FUSED_LORA_METAL"


class Problem(NamedTuple):
    """What the rule looks at.

    Attributes:
        rows: M, all leading axes of x together; of a batch that shares W, those of all elements.
        k: in_features.
        n: out_features.
        rank: of the adapter.
        dtype: of x, A, W.
        has_kernel: whether there is a W to multiply.
        wide_b: whether B is float32 under a 16-bit x, a traced scaling folded into it.
        shared_kernel: whether a batch of adapters shares W.
    """

    rows: int
    k: int
    n: int
    rank: int
    dtype: str
    has_kernel: bool
    wide_b: bool = False
    shared_kernel: bool = False


def best_library(available: Collection[str], problem: Problem) -> str | None:
    """The one of `available`, libraries that serve one platform, for a call; None for XLA."""
    setting = metal_setting()
    rows, k, n, rank, *_ = problem
    work = rows * ((k * n if problem.has_kernel else 0) + rank * (k + n))
    wanted = setting == "always" or (setting == "auto" and work >= _METAL_WORK)
    serving = [name for name in available if rank <= MAX_RANK.get(name, rank)]
    if "metal" in serving and wanted:
        return "metal"
    return next((name for name in serving if name != "metal"), None)


def metal_setting() -> str:
    """What Metal gets, by the environment variable JAX_FUSED_LORA_METAL.

    "auto" (the default), calls with work enough to pay for a command buffer; "always"; or "never".
    It is read when a program is compiled.

    Raises:
        ValueError: the variable has another value.
    """
    setting = os.environ.get(_METAL_VARIABLE, "auto")
    if setting not in ("auto", "always", "never"):
        raise ValueError(f"{_METAL_VARIABLE} is {setting!r}, needed 'auto', 'always' or 'never'")
    return setting


class _Limits(NamedTuple):
    kernel: int  # rows up to which the native product wins
    base: int  # rows from which XLA's product with the native low-rank part wins
    rank_one: int = 1 << 62  # rows up to which the native low-rank part alone wins, of rank 1


_ANY = _Limits(1 << 62, 1 << 62)  # number of rows

# XLA multiplies rank 1 in float32 number by number, in one loop with what is around it, and writes
# y over x where x is not needed again. Zen 4, two threads: forward, 1024 wide, 1 row 0.68, 4 rows
# 0.64, 64 rows 1.12, 512 rows 0.74, but 2048 wide 1.42; with the backward pass, 1024 wide, 1 row
# 1.14, 64 rows 1.45, 128 rows 0.90. Ours forward and XLA's backward: 1 row 0.99, 2 rows 1.13, 4
# rows 1.15, so more than one are XLA's whole. In 16 bits ours is faster: 64 rows 0.78 and 0.85.
_RANK_ONE_FORWARD, _RANK_ONE_BACKWARD = 1, 0

_FORWARD = {
    "float32": _Limits(96, 97, _RANK_ONE_FORWARD),
    "float16": _ANY,
    "bfloat16": _ANY,
    "float32 on AVX-512": _ANY._replace(rank_one=_RANK_ONE_FORWARD),
}
_BACKWARD = {
    "float32": _Limits(64, 65, _RANK_ONE_BACKWARD),
    "float16": _ANY,
    "bfloat16": _ANY,
    "float32 on AVX-512": _ANY._replace(rank_one=_RANK_ONE_BACKWARD),
}


# Of an H100, bfloat16, rank 16 unless said; the ratio, forward and with the backward pass, to the
# time that XLA takes if h and t are rounded to bfloat16. What takes over where these kernels don't,
# the definition, rounds once and takes 1.08 to 1.31 and 1.02 to 1.37.
#
# Rows that one pass over W serves: 1 and 16 rows of 4096→4096 take 0.86 and 0.86 of XLA's time, of
# 1024→1024 0.66 and 0.72. Where the kernel below does not take the rank, 16 rows of 512→512, rank
# 12, take 2.4: so not of smaller layers.
_CUDA_FEW_ROWS, _CUDA_FEW_WORK = 16, 1 << 20
# Rows that one kernel of the tensor cores serves, up to 64 ranks in whole 16 bytes. 4096→4096: 32
# rows 0.78 and 0.85, 64 rows 0.69 and 0.74, 128 rows 0.74 and 0.79; 1024→1024: 64 rows 0.96 and
# 0.81, 128 rows 0.70 and 0.85; 4096→11008: 0.85 and 0.78, 0.85 and 0.86; 4096→1024, rank 64: 0.86,
# 1.01; 768→768: 128 rows 0.68 and 0.92; 512→512, rank 8: 1 row 1.02 and 1.01 to 1.32, 16 rows 0.96
# and 1.11, 64 rows 1.04 and 0.92 (the definition 1.12 and 1.44). Smaller ones were not measured.
# Few rows and the backward pass, here and by the definition: 16 rows of 4096→4096 0.87 and 1.09, of
# 1024→1024 0.91 to 1.14 and 1.37, one row of these 0.97 to 1.00 and 1.11, 1.10 to 1.25 and 1.08.
_CUDA_SOME_ROWS, _CUDA_FEW_RANK, _CUDA_SOME_WORK = 128, 64, 1 << 18
# More of them, up to 4096 wide, of an H200: 192 rows of 1024→1024 0.56 and 0.59, 256 rows of
# 4096→4096 0.76 and 0.83; rank 64: 256 rows of 1024→1024 0.61 and 0.75, of 2048→2048 0.72 and 0.80,
# of 4096→4096 0.90 and 0.91. But 11008→4096, of an H100: 1.07 to 0.98 and 1.04.
_CUDA_MORE_ROWS, _CUDA_MORE_WIDTH = 256, 4096
# Rows from which the product below has them too, of more ranks, in layers from 2048 wide on, by
# name, and the definition: 192 rows of 4096→4096, rank 128, 0.92 and 1.11 (1.08 and 1.23), 256 rows
# of rank 256 0.58 and 0.86 (1.10 and 1.44), 128 rows of 4096→11008, rank 128, 0.93 and 1.08 (1.07
# and 1.17).
_CUDA_HIGH_RANK_ROWS, _CUDA_HIGH_RANK_WIDTH = 128, 2048
# Multiplications of a gradient of A and one of B from which XLA's products are faster than our
# kernel, which multiplies t's halves by mma.sync: up to 128 ranks, and of more. In float16 XLA
# scales each column of t and h first. Forward and backward on an H200, microseconds with the kernel
# and with XLA's: bfloat16, 4096→4096, 512 rows of rank 64 78.2 and 78.5, of rank 128 102 and 106,
# 1024 rows of rank 32 126 and 131, 2048 rows of rank 64 251 and 253; 2048→2048, 2048 rows of rank
# 64 104 and 114; float16, 4096→4096, rank 128, 512 rows 110 and 114, 2048 rows 346 and 352;
# 2048→2048, 2048 rows of rank 64 112 and 129. Larger ones were measured on an H100 with a slower
# kernel, to the plain formula: bfloat16, 2048 rows of rank 128 1.14 and 1.03, 8192 rows 1.07 and
# 0.97, of rank 64 0.88 and 0.85, rank 256, 512 rows 1.22 and 0.99; float16, 8192 rows of rank 64
# 0.91 and 0.85, of rank 128 1.10 and 0.99, rank 256, 512 rows 1.27 and 1.04.
_CUDA_GRADIENT_WORK = {"bfloat16": (1 << 31, 1 << 27), "float16": (1 << 32, 1 << 29)}
_CUDA_GRADIENT_RANK = 128
# But up to so many ranks and columns of g, under a product of dx so wide that it lasts as long, dB
# is summed in the sweep for t and costs little. XLA's and swept, one after the other: 8192 rows of
# 4096→4096 0.87 and 0.86, 0.83 and 0.84, 2048 rows 0.87 and 0.86, 0.84 and 0.85, 1024 rows 0.91 and
# 0.92, 0.89 and 0.85, 2048 rows of 11008→4096 0.95 and 0.94; where no multiprocessors are left for
# the sweep, 4096 rows of 3072→3072, 0.86 and 0.87.
_CUDA_SWEPT_RANK, _CUDA_SWEPT_COLUMNS, _CUDA_SWEPT_WIDTH = 16, 4096, 3072
# Rows from which the product with the rank inside it may be ahead, and with wider layers, and how
# narrow a smaller W may be; `_many_rows` says where it is. Wider ones of fewer rows were slower
# (384 rows of 4096→11008 1.26 and 1.28 of an H100, 1.04 and 1.07 of an H200 with smaller tiles). Of
# 256→256, rank 8, an H200: 512 rows 0.64 and 0.72, 8192 rows 0.87 and 0.97, but one row 1.08 and
# 1.52.
_CUDA_MANY_ROWS, _CUDA_MANY_WIDE_ROWS, _CUDA_MANY_WIDTH = 257, 385, 256
# Without W, rows up to which the kernels for few rows are faster than the definition, of the ranks
# that they take; multiples of 64 in and out of 16 bits, of 4 in float32. An H200, layers in a loop
# within one program, microseconds of the definition (in brackets of the plain formula) and ours.
# 4096→4096, rank 16, bfloat16, 1 row 5.4 (3.2) and 2.3, 16 rows 4.6 (3.7) and 3.7, 128 rows 5.6
# (4.0) and 3.7, 480 rows 7.2 (5.6) and 5.1, float16 10.6 (5.7) and 5.3; rank 32, 16 rows 5.2 (3.8)
# and 5.1, 400 rows 8.6 (7.0) and 7.4, but rank 64, 16 rows 6.4 (5.0) and 8.0; 1024→1024, 240 rows
# 4.2 (3.2) and 3.0. float32, 32 rows 5.6 (4.5) and 3.4, 128 rows 7.6 (5.9) and 8.3; 1024→1024, rank
# 8, 1 row 2.1 (2.1) and 1.8, 64 rows 4.0 (3.4) and 2.8, 256 rows 4.7 (3.9) and 6.4.
# Forward and backward: 16 rows 24.8 (12.5) and 11.5, 480 rows 33.1 (23.1) and 18.1, one row 13.4
# (7.5) and 8.4; float32, 1024→1024, rank 8, 16 rows 18.7 (16.0) and 8.8, but one row 4.9 (5.0) and
# 6.8, whose backward pass XLA's is.
_CUDA_ALONE_FEW_RANKS = (8, 16, 32)
_CUDA_ALONE_FEW_ROWS = {"float32": 64, "bfloat16": 480, "float16": 480}
# Without W, in float16, multiplications from which ours is faster, forward and backward: there the
# definition multiplies h and t in float32. An H200, microseconds of the definition, whose dA and dB
# were not split then, and ours: 4096→4096, rank 16, 512 rows 9.4 and 10.3, 2048 rows 23.4 and 16.9,
# 8192 rows 84.6 and 46.3, 512 rows of rank 64 22.1 and 19.3, 8192 rows of 1024→1024, rank 8, 21.9
# and 13.7; forward and backward, 512 rows (forward XLA's) 48.8 and 31.9, of 1024→1024 26.7 and
# 21.0, 4096 rows 177 and 85, 2048 rows of 2048→2048, rank 256, 336 and 178.
_CUDA_ALONE_FORWARD, _CUDA_ALONE_BACKWARD = 1 << 27, 1 << 24
# More rows than few, in 16 bits, of the ranks for which the kernel for these is the faster one;
# multiples of 128 in and out. An H200, bfloat16, rank 16 unless said, microseconds of the
# definition (in brackets of the plain formula) and ours, forward, and forward and backward (†:
# before the gradients had the copy engine): 4096→4096, 512 rows 7.5 (6.2) and 6.8, 30.9 (22.3)
# and 25.2†, 1024 rows 10.2 (8.7) and 9.6, 35.3 (28.3) and 31.1, 2048 rows 14.5 (12.0) and 12.4,
# 50.4 (42.2) and 46.0, 4096 rows 22.2 (19.3) and 18.0, 77.0 (61.8) and 75.3†, 8192 rows 45.9
# (39.6) and 35.2, 139.6 (119.4) and 121.0; 2048 rows of 4096→11008 24.9 (21.1) and 20.0, 82.8
# (68.0) and 75.5†; of 2048→2048 9.3 (7.7) and 8.1, 34.8 (28.3) and 29.0†; 512 rows of 512→512 4.2
# (3.2) and 4.0, 18.6 (13.4) and 13.3, of 256→256, rank 8, 4.2 (2.7) and 3.7, 14.0 (9.6) and 12.4.
# Rank 32, 4096→4096: 1024 rows 11.2 and 13.6, 41.6 and 46.2†, 8192 rows 49.2 and 42.1, 152 and
# 152†; rank 64, 8192 rows 55.8 and 63.4.
_CUDA_ALONE_MANY_RANKS = (8, 16)
# In bfloat16, ranks and sizes that it does not take are ours, by the older kernel, in narrow ones.
# 1024→1024, rank 16, the definition and that one, forward, and forward and backward: 2048 rows 6.8
# and 7.1, 27.5 and 24.7 (with XLA's forward 30.8), 4096 rows 9.4 and 9.9, 36.8 and 31.7 (34.1),
# 8192 rows 15.3 and 13.4; of 2048→2048 8192 rows 22.1 and 22.7, 79.5 and 81.0.
_CUDA_ALONE_ROWS, _CUDA_ALONE_WIDTH, _CUDA_ALONE_RANK = 2048, 1024, 16


def forward_form(
    library: str, problem: Problem, *, product: bool = False, named: bool = False
) -> str:
    """The form of `lora_forward`.

    Args:
        library: that takes the call.
        problem: what it computes.
        product: as in `implementations.Library`.
        named: whether the user named the library; "xla" is then no answer.
    """
    if library == "cuda" and not problem.has_kernel:
        wins = _few_alone(problem) or _alone(problem, _CUDA_ALONE_FORWARD)
        return "delta" if named or (product and wins) else "xla"
    if library == "cuda":
        product = product and _tma_takes(problem)
        measured = problem.rank <= _CUDA_FEW_RANK and problem.k * problem.n >= _CUDA_FEW_WORK
        few = problem.rows <= _CUDA_FEW_ROWS and measured
        wins = few or _some_rows(problem) or _high_rank(problem) or _many_rows(problem, problem.n)
        return _cuda_form(problem, product, wins, named)
    return _form(library, problem, _FORWARD, named)


def backward_form(
    library: str, problem: Problem, *, product: bool = False, named: bool = False
) -> str:
    """The form of `lora_backward`; arguments as of `forward_form`."""
    if library == "cuda" and not problem.has_kernel:
        few = _few_alone(problem) and (problem.dtype != "float32" or problem.rows > 1)
        wins = few or _alone(problem, _CUDA_ALONE_BACKWARD)
        return "delta" if named or (product and wins) else "xla"
    if library == "cuda":
        # dx = g·Wᵀ + t·Aᵀ reads A as its rows lie, one rank after the other.
        takes = _tma_takes(problem) and problem.rank % 8 == 0
        wins = _some_rows(problem) or _high_rank(problem) or _many_rows(problem, problem.k)
        form = _cuda_form(problem, product and takes, wins, named)
        return "dx" if form == "kernel" and _leaves_gradients(problem) else form
    return _form(library, problem, _BACKWARD, named)


def _form(library: str, problem: Problem, limits: dict[str, _Limits], named: bool) -> str:
    limit = limits[_kind(problem.dtype)]
    if not problem.has_kernel:
        loses = library == "cpu" and problem.rank == 1 and problem.rows > limit.rank_one
        return "xla" if loses and not named else "delta"
    if library == "metal" or problem.rows <= limit.kernel:
        return "kernel"
    if problem.rows >= limit.base:
        return "base"
    return "kernel" if named else "xla"


def _cuda_form(problem: Problem, product: bool, wins: bool, named: bool) -> str:
    if not named and (problem.shared_kernel or not (product and wins)):
        return "xla"
    if problem.shared_kernel:  # "kernel" would sweep W for each adapter
        return "base"
    return "kernel" if product or problem.rows <= _CUDA_FEW_ROWS else "base"


def _some_rows(problem: Problem) -> bool:
    """Whether few rows are faster, in one kernel or as a product of few tiles."""
    rows, rank, work = problem.rows, problem.rank, problem.k * problem.n
    narrow = max(problem.k, problem.n) <= _CUDA_MORE_WIDTH
    few = rows <= (_CUDA_MORE_ROWS if narrow else _CUDA_SOME_ROWS)
    return few and rank <= _CUDA_FEW_RANK and rank % 8 == 0 and work >= _CUDA_SOME_WORK


def _high_rank(problem: Problem) -> bool:
    """Whether the product with the rank inside it is faster though its tiles are few."""
    rows, rank = problem.rows, problem.rank
    high = rank > _CUDA_FEW_RANK and rank % 8 == 0
    wide = min(problem.k, problem.n) >= _CUDA_HIGH_RANK_WIDTH
    return high and wide and _CUDA_HIGH_RANK_ROWS <= rows <= _CUDA_MORE_ROWS


def _leaves_gradients(problem: Problem) -> bool:
    """Whether dA and dB are better XLA's, which splits t and h for 16 bits."""
    if problem.dtype == "float32" or problem.wide_b:
        return False
    rank, work = problem.rank, _low_rank_work(problem)
    large = work >= _CUDA_GRADIENT_WORK[problem.dtype][rank > _CUDA_GRADIENT_RANK]
    narrow = rank <= _CUDA_SWEPT_RANK and problem.n <= _CUDA_SWEPT_COLUMNS
    swept = narrow and problem.k >= _CUDA_SWEPT_WIDTH
    return large and not swept


def _low_rank_work(problem: Problem) -> int:
    """Multiplications of a pass of the low-rank part, and of the gradients of A and B."""
    return problem.rows * problem.rank * (problem.k + problem.n)


def _few_alone(problem: Problem) -> bool:
    """Whether a pass without W, of few rows, is faster."""
    multiple = 4 if problem.dtype == "float32" else 64
    whole = problem.k % multiple == 0 and problem.n % multiple == 0
    few = problem.rows <= _CUDA_ALONE_FEW_ROWS[problem.dtype]
    return few and whole and problem.rank in _CUDA_ALONE_FEW_RANKS and not problem.wide_b


def _alone(problem: Problem, work: int) -> bool:
    """Whether a pass without W is faster, in float16 from so many multiplications on."""
    if not _tma_takes(problem):
        return False
    narrow = max(problem.k, problem.n) <= _CUDA_ALONE_WIDTH and problem.rank <= _CUDA_ALONE_RANK
    if problem.dtype == "float16":
        wins = _low_rank_work(problem) >= work
    else:
        wins = narrow and problem.rows >= _CUDA_ALONE_ROWS
    return wins or _many_alone(problem)


def _many_alone(problem: Problem) -> bool:
    """Whether the copy engine's kernel for many rows without W takes a pass and is faster."""
    whole = problem.k % 128 == 0 and problem.n % 128 == 0
    many = problem.rows > _CUDA_ALONE_FEW_ROWS[problem.dtype]
    return many and whole and problem.rank in _CUDA_ALONE_MANY_RANKS


def _many_rows(problem: Problem, columns: int) -> bool:
    """Whether the product (rows, columns) with the rank inside it is faster than the definition.

    It goes in rounds, a tile for each of an H100's multiprocessors, of 128×128, two or half of
    these, in pairs of rows. One round is fast, however full: of an H200, 320 rows of 4096→4096 0.96
    and 0.98, 288 rows of 4096→1024 0.70 and 0.78, 512 rows of 1024→1024 0.52 and 0.55, of 2048→2048
    0.68 and 0.82, of 4096→1024 0.69 and 0.78, of 2048→256 0.60 and 0.66, 1024 rows of 1024→1024
    0.68 and 0.70, of 768→768 0.57 and 0.65. Of more, the last must not be too empty: 640 rows of
    3072→3072 0.96 and 0.96, 384 rows of 5120→5120 1.03 and 1.12, of 4096→11008 1.04 and 1.07, 512
    rows 0.88 and 0.88, 2048 rows of 1024→1024 0.75 and 0.86; of an H100, 640 rows of 4096→4096 1.25
    and 1.27, but 768 rows 0.99 and 1.04, 1024 rows 0.81 and 0.93, 1280 rows 1.05 and 1.03, 8192
    rows 0.81 and 0.86, 1024 rows of 2048→2048 1.06 and 1.08.
    """
    rows, wide = problem.rows, max(problem.k, problem.n) > _CUDA_MORE_WIDTH
    fewest = _CUDA_MANY_WIDE_ROWS if wide else _CUDA_MANY_ROWS
    narrow = min(problem.k, problem.n) < _CUDA_MANY_WIDTH
    if rows < fewest or (narrow and problem.k * problem.n < _CUDA_SOME_WORK):
        return False
    multiprocessors = 132

    def rounds(tile: tuple[int, int]) -> int:
        pairs = -(-rows // (2 * tile[0])) * -(-columns // tile[1])
        return -(-pairs // (multiprocessors // 2))

    # Each as long as so many tiles of 128×128.
    lasts = min(1.1 * rounds((128, 128)), 2 * rounds((128, 256)), 0.68 * rounds((64, 128)))
    full = rows * columns / 128**2 >= 0.62 * lasts * multiprocessors
    return full or rounds((128, 128)) == 1


def _tma_takes(problem: Problem) -> bool:
    """Whether Hopper's copy engine reads the operands: rows of whole 16 bytes, of 16-bit types."""
    whole = all(size > 0 and size % 8 == 0 for size in (problem.k, problem.n))
    return whole and problem.dtype != "float32" and not problem.wide_b


def _kind(dtype: jax.typing.DTypeLike) -> str:
    """The dtype, and whether this CPU multiplies it faster than others do."""
    name = jnp.dtype(dtype).name
    return f"{name} on AVX-512" if name == "float32" and "avx512bw" in _cpu_flags() else name


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What the CPU has and Linux lets programs use; nothing elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))
