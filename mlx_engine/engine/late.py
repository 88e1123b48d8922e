"""The one place that imports what engines in this process need MLX for."""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING

from mlx_engine.config import BatchConfig
from mlx_engine.errors import ModelLoadError, describe

if TYPE_CHECKING:
    from mlx_engine.engine.model_holder import ModelHolder

# The first imports mlx_lm in the one way that does no harm.
_IN_ORDER = ("mlx_engine.models", "mlx_engine.engine.model_holder")
_imported = threading.Event()


def mlx_is_imported() -> bool:
    """Whether ``import_mlx`` has nothing left to do. From any thread."""
    return _imported.is_set()


def import_mlx() -> None:
    """Import MLX, mlx_lm and what is built on them, which takes seconds.

    The first engine that starts does it on the MLX thread: what they make when they are imported
    belongs to that thread, and event loops go on meanwhile.

    Raises:
        ModelLoadError: one of them is not installed, or cannot be used on this machine.
    """
    try:
        for name in _IN_ORDER:
            import_module(name)
    except Exception as error:
        raise ModelLoadError(_advice(error)) from error
    _imported.set()


def make_holder(batching: BatchConfig | None) -> ModelHolder:
    """Where an engine keeps its model; what that needs is imported, if it was not yet.

    Raises:
        ModelLoadError: as ``import_mlx`` does.
    """
    import_mlx()
    from mlx_engine.engine.model_holder import ModelHolder  # noqa: PLC0415

    return ModelHolder(batching)


def _advice(error: Exception) -> str:
    mlx = "mlx" if sys.platform == "darwin" else "'mlx[cpu]'"
    return (
        f"MLX cannot be used here ({describe(error)}). An engine in this process needs it, on a "
        f"Mac with Apple silicon or on Linux: pip install {mlx} mlx-lm. FakeEngine, of "
        "mlx_engine.testing, needs none."
    )
