"""The layers that the bench measures, and what each of them amounts to."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from jax_fused_lora.implementations import default_platform

OPS = ("lora_forward", "lora_linear")
DIRECTIONS = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
# Operations per byte from which a layer is taken to be bound by arithmetic: machines differ, and
# this only chooses the unit in which a row is printed.
COMPUTE_BOUND = 16.0


@dataclass(frozen=True)
class Case:
    """One layer to measure: `rows`×`in_features` → `out_features` with a given rank and dtype.

    Attributes:
        op: "lora_forward", the low-rank part alone, or "lora_linear", the whole layer.
        direction: "forward", or "forward+backward" with the gradients of x, A and B (not W).
        chain: how many layers to chain, if `layers` shall not choose.
    """

    op: str
    rows: int
    in_features: int
    out_features: int
    rank: int
    dtype: str = "float32"
    direction: str = "forward"
    chain: int | None = None

    def __post_init__(self) -> None:
        if self.rank > min(self.in_features, self.out_features):
            raise ValueError(
                f"rank must be at most in_features and out_features, got rank {self.rank} "
                f"for {self.in_features}→{self.out_features}"
            )

    def __str__(self) -> str:
        return f"{self.op} {self.shape} rank {self.rank} {self.dtype} {self.direction}"

    @property
    def shape(self) -> str:
        """The shape as it is printed, such as `512×1024→1024`."""
        return f"{self.rows}×{self.in_features}→{self.out_features}"

    @property
    def has_kernel(self) -> bool:
        """Whether the layer has a base product."""
        return self.op == "lora_linear"

    @property
    def backward(self) -> bool:
        """Whether gradients are computed as well."""
        return self.direction == "forward+backward"

    @property
    def itemsize(self) -> int:
        """Bytes of a number in storage."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def low_rank_numbers(self) -> int:
        """How many numbers A and B have together."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def weight_numbers(self) -> int:
        """How many numbers W (where there is one), A and B have together."""
        return self.in_features * self.out_features * self.has_kernel + self.low_rank_numbers

    @property
    def moved_bytes(self) -> int:
        """Bytes of each direction's operands and results, which no layer can avoid moving."""
        x, y = self.rows * self.in_features, self.rows * self.out_features
        forward = self.weight_numbers + x + y
        # Backward reads the weights, x and the gradient of y; it writes those of x, A and B.
        backward = self.weight_numbers + x + y + x + self.low_rank_numbers
        return (forward + backward * self.backward) * self.itemsize

    @property
    def flops(self) -> int:
        """Floating-point operations of a layer, a multiplication and an addition being two."""
        forward = 2 * self.rows * self.weight_numbers
        # Backward: g·Wᵀ; t = g·Bᵀ and t·Aᵀ; xᵀ·t and hᵀ·g.
        backward = forward + 2 * self.rows * self.low_rank_numbers
        return forward + backward * self.backward

    @property
    def compute_bound(self) -> bool:
        """Whether GFLOP/s (rather than GB/s) says how well the machine is used."""
        return self.flops >= COMPUTE_BOUND * self.moved_bytes

    @property
    def layers(self) -> int:
        """How many layers with weights of their own the chain has; even, so that in ≠ out works.

        Enough to move 64 MB, within 8 to 64; fewer when a program would take seconds or
        gigabytes. The chain is gone through once: in a second pass XLA would find W converted.

        A GPU has 64 as long as that is bearable: starting a program takes it some 100 µs, in which
        many a layer would be done.
        """
        if self.chain is not None:
            return self.chain + self.chain % 2
        if default_platform() == "cpu":
            enough = max((64 << 20) // self.moved_bytes + 1, 8)
            bearable = min((1 << 36) // self.flops, (1 << 30) // self.moved_bytes)
        else:
            enough, bearable = 64, min((1 << 43) // self.flops, (8 << 30) // self.moved_bytes)
        return max(2, min(enough, 64, bearable) // 2 * 2)

    @property
    def passes(self) -> int:
        """How often a program goes through the chain.

        Once on a CPU (see `layers`). On a GPU as often as it takes to move 2 GB, within 1 to 16:
        where a program is started XLA brings its CUDA graphs up to date, at 2 to 5 µs for each
        small layer; in a loop within the program it starts them as they are.
        """
        if default_platform() == "cpu":
            return 1
        return max(1, min(16, (2 << 30) // (self.layers * self.moved_bytes)))


def table_cases() -> Iterator[Case]:
    """The shapes whose figures the project states.

    The smallest is stated for 16 layers, a short program whose adapters a second-level cache holds,
    and for 64, whose adapters it does not.
    """
    every = DTYPES
    half = ("bfloat16", "float16")
    single = ("float32",)
    train = ("float32", "bfloat16")
    forward = (
        ("lora_forward", 1, 1024, 8, single),
        ("lora_forward", 512, 2048, 16, single),
        ("lora_linear", 1, 1024, 8, half),
        ("lora_linear", 1, 2048, 8, every),
        ("lora_linear", 16, 1024, 16, every),
        ("lora_linear", 64, 1024, 16, every),
        ("lora_linear", 2048, 2048, 16, train),
    )
    yield Case("lora_forward", 1, 1024, 1024, 8, chain=16)
    for op, rows, width, rank, dtypes in forward:
        for dtype in dtypes:
            yield Case(op, rows, width, width, rank, dtype)
    for op in OPS:
        for dtype in train:
            yield Case(op, 512, 1024, 1024, 16, dtype, "forward+backward")


def sweep_cases() -> Iterator[Case]:
    """A grid over everything that the choice of a form depends on."""
    rows = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
    widths = (256, 512, 1024, 2048, 4096)
    grid = itertools.product(OPS, DIRECTIONS, DTYPES, (8, 16, 64), widths, rows)
    for op, direction, dtype, rank, width, m in grid:
        yield Case(op, m, width, width, rank, dtype, direction)


PRESETS = {"table": table_cases, "sweep": sweep_cases}
