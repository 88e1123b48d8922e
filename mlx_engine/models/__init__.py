"""Where models come from: the embedded demo model, and everything that loads weights."""

from mlx_engine.models.file_limit import file_limit_kept

with file_limit_kept():
    import mlx_lm  # noqa: F401 - the first import in this package; the others find it done
