"""LoRA layers for JAX as one fused XLA custom call, forward and backward."""

from jax_fused_lora.implementations import Implementation, implementations
from jax_fused_lora.ops import lora_forward, lora_linear
from jax_fused_lora.version import __version__

__all__ = ["Implementation", "__version__", "implementations", "lora_forward", "lora_linear"]
