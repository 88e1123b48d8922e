"""One request on the MLX thread: prompt, prefill, decode, text. Synchronous throughout."""
