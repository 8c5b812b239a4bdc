"""`python -m jax_fused_lora`."""

from jax_fused_lora.cli import main

raise SystemExit(main())
