"""Drop-ins for `flax.nnx.LoRA` and `flax.nnx.LoRALinear` that run through the fused calls."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from jax_fused_lora.ops import lora_forward, lora_linear


class LoRA(nnx.LoRA):
    """`flax.nnx.LoRA` (https://flax.readthedocs.io) computed by `lora_forward` and `lora_linear`.

    When `base_module` is an `nnx.Linear` that computes in the adapter's dtype and has no
    `dot_general`, `precision` or `preferred_element_type` of its own, its kernel and bias and the
    adapter go through one `lora_linear`; any other base module is called and `lora_forward` added
    to its result. As in Flax, an adapter is float32 unless it is told, and a sum of different
    dtypes promotes: beside a bfloat16 layer both are slower than an adapter with `param_dtype` (of
    `LoRALinear`, `lora_param_dtype`) or `dtype` of bfloat16, too.

    Args:
        in_features: the number of input features.
        lora_rank: the rank of the adapter.
        out_features: the number of output features.
        alpha: the adapter is scaled by alpha / rank (LoRA: Hu et al., 2021, arXiv:2106.09685).
            None means a scaling of 1, as in Flax.
        use_rslora: scale by alpha / √rank instead (rsLoRA: Kalajdzievski, 2023,
            arXiv:2312.03732).
        implementation: one of `jax_fused_lora.implementations()`, or None for the best.
        **kwargs: all that `flax.nnx.LoRA` takes: base_module, dtype, param_dtype, a_initializer,
            b_initializer, lora_param_type, promote_dtype, rngs, a_metadata, b_metadata.

    Attributes:
        lora_a: `lora_param_type` of shape `(in_features, lora_rank)`.
        lora_b: `lora_param_type` of shape `(lora_rank, out_features)`.
        scaling: what the adapter is scaled by.

    Raises:
        ValueError: `use_rslora` without an `alpha` to scale.
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        alpha: float | None = None,
        use_rslora: bool = False,
        implementation: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(in_features, lora_rank, out_features, **kwargs)
        self.scaling = _scaling(lora_rank, alpha, use_rslora)
        self.implementation = implementation

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Applies the base module, if there is one, and adds the adapter.

        Args:
            x: `(..., in_features)`.
            **kwargs: passed to the base module; `out_sharding`, which an `nnx.Linear` takes, to the
                adapter as well.

        Returns:
            `(..., out_features)`.

        Raises:
            ValueError: the base module is not callable.
        """
        x, lora_a, lora_b = self.promote_dtype(
            (x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype
        )
        base: Any = self.base_module
        out_sharding = kwargs.get("out_sharding")
        if base is None:
            return self._delta(x, lora_a, lora_b, out_sharding)
        if not callable(base):
            raise ValueError(f"base_module must be callable, got {type(base).__name__}")
        if type(base).__call__ is nnx.Linear.__call__ and not kwargs.keys() - {"out_sharding"}:
            fused = self._fused(base, x, x, lora_a, lora_b, out_sharding)
            if fused is not None:
                return fused
        return self._delta(x, lora_a, lora_b, out_sharding) + base(x, **kwargs)

    def _delta(
        self, x: jax.Array, lora_a: jax.Array, lora_b: jax.Array, out_sharding: Any
    ) -> jax.Array:
        # A promote_dtype of one's own may leave dtypes mixed, which Flax leaves to `@`.
        x, lora_a, lora_b = promote_dtype((x, lora_a, lora_b))
        return lora_forward(
            x,
            lora_a,
            lora_b,
            scaling=self.scaling,
            implementation=self.implementation,
            out_sharding=out_sharding,
        )

    def _fused(
        self,
        linear: nnx.Linear,
        inputs: jax.Array,
        x: jax.Array,
        lora_a: jax.Array,
        lora_b: jax.Array,
        out_sharding: Any,
    ) -> jax.Array | None:
        """`linear(inputs)` and the adapter of x in one call, or None where that is not the same.

        It is not where the layer has a product of its own (`dot_general`, `precision`,
        `preferred_element_type`) or computes in another dtype than the adapter.
        """
        bias = None if linear.bias is None else linear.bias[...]
        inputs, kernel, bias = linear.promote_dtype(
            (inputs, linear.kernel[...], bias), dtype=linear.dtype
        )
        plain = (
            linear.dot_general is lax.dot_general
            and linear.precision is None
            and linear.preferred_element_type is None
        )
        operands = (inputs, kernel, x, lora_a, lora_b, *([] if bias is None else [bias]))
        if not plain or len({operand.dtype for operand in operands}) > 1:
            return None
        return lora_linear(
            inputs,
            kernel,
            lora_a,
            lora_b,
            bias=bias,
            scaling=self.scaling,
            implementation=self.implementation,
            out_sharding=out_sharding,
        )


class LoRALinear(nnx.LoRALinear):
    """`flax.nnx.LoRALinear` computed by one `lora_linear`, where `LoRA` says.

    Args:
        in_features: the number of input features.
        out_features: the number of output features.
        lora_rank: the rank of the adapter.
        lora_dtype: the dtype of the adapter's computation, inferred by default.
        lora_param_dtype: the dtype of the adapter's parameters.
        a_initializer: initializer of lora_a, He-uniform by default.
        b_initializer: initializer of lora_b, zeros by default.
        lora_param_type: the type of the adapter's parameters.
        lora_promote_dtype: how the adapter's operands are promoted.
        alpha: as in `LoRA`.
        use_rslora: as in `LoRA`.
        implementation: as in `LoRA`.
        rngs: random number generators.
        a_metadata: metadata of lora_a.
        b_metadata: metadata of lora_b.
        **kwargs: all that `flax.nnx.Linear` takes.

    Attributes:
        kernel: `nnx.Param` of shape `(in_features, out_features)`.
        bias: `nnx.Param` of shape `(out_features,)`, or None.
        lora: the adapter, a `LoRA`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: Any = None,
        lora_param_dtype: Any = jnp.float32,
        lora_promote_dtype: Any = nnx.nn.dtypes.promote_dtype,
        alpha: float | None = None,
        use_rslora: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        # Not nnx.LoRALinear.__init__: it would draw an adapter of its own from rngs.
        adapter = {
            name: kwargs.pop(name)
            for name in (
                "a_initializer", "b_initializer", "lora_param_type", "a_metadata", "b_metadata",
            )
            if name in kwargs
        }  # fmt: skip
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **kwargs)
        self.lora: Any = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            promote_dtype=lora_promote_dtype,
            alpha=alpha,
            use_rslora=use_rslora,
            implementation=implementation,
            rngs=rngs,
            **adapter,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer and its adapter.

        Args:
            x: `(..., in_features)`.
            out_sharding: the sharding of the result, as in `flax.nnx.Linear`.

        Returns:
            `(..., out_features)`.
        """
        lora: Any = self.lora
        if type(lora).__call__ is not LoRA.__call__ or lora.base_module is not None:
            # Somebody's own adapter.
            return nnx.Linear.__call__(self, x, out_sharding=out_sharding) + lora(x)
        adapted, lora_a, lora_b = lora.promote_dtype(
            (x, lora.lora_a[...], lora.lora_b[...]), dtype=lora.dtype
        )
        fused = lora._fused(self, x, adapted, lora_a, lora_b, out_sharding)
        if fused is not None:
            return fused
        return nnx.Linear.__call__(self, x, out_sharding=out_sharding) + lora._delta(
            adapted, lora_a, lora_b, out_sharding
        )


def _scaling(rank: int, alpha: float | None, use_rslora: bool) -> float:
    if alpha is None:
        if use_rslora:
            raise ValueError("use_rslora=True scales by alpha / √rank and needs alpha, got None")
        return 1.0
    return alpha / (math.sqrt(rank) if use_rslora else rank)
