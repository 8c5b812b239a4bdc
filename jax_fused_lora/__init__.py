"""LoRA layers for JAX as one fused XLA custom call, forward and backward."""

from jax_fused_lora.implementations import Implementation, implementations
from jax_fused_lora.ops import lora_forward, lora_linear

__all__ = ["Implementation", "implementations", "lora_forward", "lora_linear"]
__version__ = "0.1.0"
