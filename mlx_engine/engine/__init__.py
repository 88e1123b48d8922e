"""Where the event loop and the MLX thread meet."""
