"""A decoder-only language model over bytes whose every linear layer is a fused LoRA layer.

Each parameter says in its metadata how it lies on a mesh with a "model" axis, after Megatron-LM
(Shoeybi et al., 2019, arXiv:1909.08053). The projections into a block are *column parallel*: W and
B are split over out_features, A is whole on every device. Those out of it are *row parallel*: W
and A are split over in_features, B is whole, and the devices' results are summed. So attention
heads and hidden units stay where they are, and attention and perceptron cost a sum over "model"
each. All other parameters are whole on every device.

The block: RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467) before attention with rotary
positions (Su et al., 2021, arXiv:2104.09864) and before the perceptron.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_fused_lora.nnx import LoRALinear

BYTES = 256
"""Tokens are bytes."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the model and of its adapters."""

    layers: int = 4
    width: int = 128
    heads: int = 8
    rank: int = 8
    alpha: float = 16.0
    implementation: str | None = None

    @property
    def hidden(self) -> int:
        """Units of the perceptron."""
        return 4 * self.width


def lora_linear(
    config: TransformerConfig,
    in_features: int,
    out_features: int,
    parallel: Literal["column", "row"],
    rngs: nnx.Rngs,
) -> LoRALinear:
    """A linear layer with an adapter, both split over "model"."""
    into, out = ("model", None) if parallel == "row" else (None, "model")
    # On a mesh, Flax lays a variable out as "out_sharding" says when it makes it. LoRA's "a" is
    # split where W's rows are, its "b" where W's columns are.
    layout: dict[str, Any] = {
        "kernel_metadata": {"out_sharding": (into, out)},
        "a_metadata": {"out_sharding": (into, None)},
        "b_metadata": {"out_sharding": (None, out)},
    }
    return LoRALinear(
        in_features,
        out_features,
        use_bias=False,
        lora_rank=config.rank,
        alpha=config.alpha,
        implementation=config.implementation,
        rngs=rngs,
        **layout,
    )


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: turn each pair of features by an angle that grows with the position.

    Args:
        x: (batch, heads, length, features), features even.
    """
    length, features = x.shape[-2:]
    frequency = 10_000.0 ** (-jnp.arange(0, features, 2) / features)
    angle = jnp.arange(length)[:, None] * frequency
    one, other = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)


class Attention(nnx.Module):
    """Causal multi-head self-attention; a device has some of the heads."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.query = lora_linear(config, width, width, "column", rngs)
        self.key = lora_linear(config, width, width, "column", rngs)
        self.value = lora_linear(config, width, width, "column", rngs)
        self.output = lora_linear(config, width, width, "row", rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, width)."""

        def by_head(y: jax.Array) -> jax.Array:
            return jnp.swapaxes(y.reshape(*y.shape[:2], self.heads, -1), 1, 2)

        # Spelled out, for it is faster on the CPU than jax.nn.dot_product_attention.
        query, key = rotate(by_head(self.query(x))), rotate(by_head(self.key(x)))
        scores = query @ jnp.swapaxes(key, -1, -2) / math.sqrt(query.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        mixed = jax.nn.softmax(scores) @ by_head(self.value(x))
        return self.output(jnp.swapaxes(mixed, 1, 2).reshape(x.shape))


class Perceptron(nnx.Module):
    """Two linear layers; a device has some of the hidden units."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.up = lora_linear(config, config.width, config.hidden, "column", rngs)
        self.down = lora_linear(config, config.hidden, config.width, "row", rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, width)."""
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """Attention, then the perceptron, each on normalised input and added to what went in."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.before_attention = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.before_perceptron = nnx.RMSNorm(config.width, rngs=rngs)
        self.perceptron = Perceptron(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, width)."""
        x = x + self.attention(self.before_attention(x))
        x = x + self.perceptron(self.before_perceptron(x))
        # Between blocks the features are whole, the batch split: said here, not left to guessing.
        return jax.lax.with_sharding_constraint(x, P("data"))


class Transformer(nnx.Module):
    """Bytes to logits of the byte that follows each.

    One is made and called where `jax.set_mesh` set a mesh with the axes "data" and "model".
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BYTES, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = lora_linear(config, config.width, BYTES, "column", rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, length, 256) of tokens (batch, length), any integer dtype."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
