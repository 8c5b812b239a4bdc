"""A text classifier on the sentence encoder, and the file that its trained part is kept in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from bert import BertEncoder, assign, checkpoint_name, read_tensors
from flax import nnx

ADAPTER_FILE = "adapter_model.safetensors"
# What PEFT puts in front of every name.
_PREFIX = "base_model.model."


class Classifier(nnx.Module):
    """A sentence encoder and a linear head on the mean of its hidden states."""

    def __init__(self, encoder: BertEncoder, width: int, classes: int, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits (batch, classes)."""
        return self.head(self.encoder.pool(ids, mask))


TRAINED = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))
"""An NNX filter for what is trained."""


def split_trained(model: Classifier) -> tuple[Any, Any, Any]:
    """The model's graph definition, the state that is trained, and the rest of the state.

    A training step takes the rest as an argument that is not differentiated, so there is neither a
    gradient nor optimizer state for the 22 million frozen weights.
    """
    graph, trained, *rest = nnx.split(model, TRAINED, ...)
    return graph, trained, rest[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that, whatever happens, has all of `content` or stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_adapter(model: Classifier, directory: Path, metadata: dict[str, str]) -> Path:
    """Write adapters and head as safetensors, with PEFT's names and shapes; return the path."""
    tensors = {}
    for place, variable in nnx.to_flat_state(nnx.state(model.encoder, nnx.LoRAParam)):
        name, transposed = checkpoint_name(place)
        value = np.asarray(variable[...])
        # safetensors writes an array's memory as it lies, whatever its strides say.
        tensors[_PREFIX + name] = np.ascontiguousarray(value.T if transposed else value)
    for name, variable in _head(model).items():
        tensors[name] = np.ascontiguousarray(np.asarray(variable[...]).T)
    path = directory / ADAPTER_FILE
    write_atomically(path, safetensors.numpy.save(tensors, metadata))
    return path


def load_adapter(model: Classifier, directory: Path) -> None:
    """Set the model's adapters and head from a file that `save_adapter` wrote."""
    tensors = read_tensors(directory / ADAPTER_FILE)
    adapters = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    assign(model.encoder, adapters, nnx.LoRAParam)
    for name, variable in _head(model).items():
        variable[...] = jnp.asarray(tensors[name].T)


def _head(model: Classifier) -> dict[str, Any]:
    """The head's variables by the names that PEFT would give them; a bias is its own transpose."""
    return {
        f"{_PREFIX}classifier.weight": model.head.kernel,
        f"{_PREFIX}classifier.bias": model.head.bias,
    }
