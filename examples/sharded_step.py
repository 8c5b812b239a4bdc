"""The training step of a LoRA model on a mesh, compiled for where everything lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformer import Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """What is run on the mesh, and the shapes and shardings of what it is run on."""

    frozen: Any
    """Layout of the weights that are not trained."""
    state: Any
    """Layout of "trained", the adapters, and "moments", the optimizer's state."""
    start: Callable[[], tuple[Any, Any]]
    """Draws the weights: () to (frozen, state)."""
    step: Callable[..., tuple[Any, jax.Array]]
    """Trains once: (state, frozen, batch) to (state, loss)."""


def compile_program(
    config: TransformerConfig,
    update: optax.GradientTransformation,
    batch: jax.ShapeDtypeStruct,
    *,
    seed: int,
    mesh: Mesh,
) -> Program:
    """Make the program that draws and trains a model; only the LoRA parameters are trained.

    `jax.set_mesh(mesh)` must hold, here and where it is run.

    Args:
        config: the model.
        update: the optimizer.
        batch: shape (sequences, bytes), dtype and sharding of a batch.
        seed: of the weights.
        mesh: with the axes "data" and "model".
    """

    def new_model() -> Transformer:
        return Transformer(config, rngs=nnx.Rngs(seed))

    def start() -> tuple[Any, Any]:
        trained, frozen = nnx.state(new_model(), nnx.LoRAParam, nnx.Param)
        return frozen, {"trained": trained, "moments": update.init(trained)}

    graph = nnx.graphdef(nnx.eval_shape(new_model))
    frozen, state = (with_layout(tree, mesh) for tree in jax.eval_shape(start))

    def loss(trained: Any, frozen: Any, pieces: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, trained, frozen)(pieces[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:]).mean()

    def step(state: Any, frozen: Any, pieces: jax.Array) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(
            state["trained"], frozen, pieces.astype(jnp.int32)
        )
        change, moments = update.update(gradient, state["moments"], state["trained"])
        return {"trained": optax.apply_updates(state["trained"], change), "moments": moments}, value

    # The state is not donated: it is small, and may still be on its way to the disk.
    everywhere = NamedSharding(mesh, P())
    jitted = jax.jit(step, out_shardings=(shardings(state), everywhere))
    return Program(
        frozen,
        state,
        # Under jit a device makes its own part of the weights, the numbers the same on any mesh.
        jax.jit(start, out_shardings=(shardings(frozen), shardings(state))),
        jitted.lower(state, frozen, batch).compile(),
    )


def with_layout(tree: Any, mesh: Mesh) -> Any:
    """The tree's shapes and dtypes with the shardings that its variables' metadata asks for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        nnx.get_named_sharding(tree, mesh),
    )


def shardings(layout: Any) -> Any:
    """The shardings of a tree of shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, layout)
