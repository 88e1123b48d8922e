"""MLX, when it is needed: the one place that imports what engines do with it."""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_engine.errors import ModelLoadError, describe

__all__ = ["import_mlx", "mlx_is_imported", "mlx_work"]

# The first imports mlx_lm in the one way that does no harm.
_IN_ORDER = ("mlx_engine.models", "mlx_engine.engine.mlx_work")
_imported = threading.Event()

if TYPE_CHECKING:
    from mlx_engine.engine import mlx_work
else:

    class _Late:
        """The module of that name, once ``import_mlx`` has been called."""

        def __getattr__(self, name: str) -> Any:
            return getattr(sys.modules[_IN_ORDER[-1]], name)

    mlx_work = _Late()


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


def _advice(error: Exception) -> str:
    mlx = "mlx" if sys.platform == "darwin" else "'mlx[cpu]'"
    return (
        f"MLX cannot be used here ({describe(error)}). An engine in this process needs it, on a "
        f"Mac with Apple silicon or on Linux: pip install {mlx} mlx-lm. FakeEngine, of "
        "mlx_engine.testing, needs none."
    )
