"""One request on the MLX thread: prompt, prefill, decode, text. Synchronous throughout."""

import mlx_engine.models  # noqa: F401 - imports mlx_lm in the one way that does no harm
