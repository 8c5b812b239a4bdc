"""Batch axes: the first axes of every operand of a call, of the full size or of size 1.

An operand has size 1 where all elements of the batch share it, as arrays broadcast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def full(operands: Sequence[Any], axes: int) -> tuple[int, ...]:
    """The sizes of the first `axes` axes of all operands together."""
    return jnp.broadcast_shapes(*(operand.shape[:axes] for operand in operands))


def each(function: Callable[..., Any], axes: int, operands: Sequence[jax.Array]) -> Any:
    """`function` of every element of the batch; what the elements share is not copied."""
    if axes == 0:
        return function(*operands)
    (size, *_) = full(operands, axes)
    mapped = [operand.shape[0] == size for operand in operands]
    given = [o if own else o.squeeze(0) for o, own in zip(operands, mapped, strict=True)]
    inner = lambda *operands: each(function, axes - 1, operands)  # noqa: E731
    return jax.vmap(inner, [0 if own else None for own in mapped])(*given)
