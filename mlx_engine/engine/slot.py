"""Where an engine keeps its model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_engine.config import ModelConfig
from mlx_engine.errors import EngineDead
from mlx_engine.generation.kv_cache import check_kv_options
from mlx_engine.models.loading import LoadedModel, load_model
from mlx_engine.outputs import ProgressCallback
from mlx_engine.turn import drop_frames
from mlx_engine.worker import mlx_thread


def _leave_mlx() -> None:
    """The MLX thread's last job. Without it mlx 0.32.4 aborts the process at its exit."""
    mx.synchronize()
    mx.clear_streams()


mlx_thread.at_exit(_leave_mlx)


class ModelSlot:
    """Holds the model of one engine. Filled, used and emptied on the MLX thread."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None

    @property
    def filled(self) -> bool:
        """Whether there is a model in it. From any thread."""
        return self._loaded is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model in it has a chat template. From any thread."""
        return self._loaded is not None and bool(self._loaded.tokenizer.has_chat_template)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""
        return None if self._loaded is None else self._loaded.context_length

    def fill(
        self,
        config: ModelConfig,
        source: Path,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Load the model. On the MLX thread; raises what ``load_model`` does."""
        try:
            self._loaded = load_model(config, source, on_progress, should_stop)
            mlx_thread.at_exit(self.empty)
            check_kv_options(self._loaded.model, config)
        except Exception as error:
            drop_frames(error)
            raise error from error.__cause__

    def get(self) -> LoadedModel:
        """The model. On the MLX thread, in a request that was admitted."""
        if self._loaded is None:
            raise EngineDead("the engine has no model any more")
        return self._loaded

    def empty(self) -> None:
        """Drop the model. On the MLX thread."""
        self._loaded = None
        mlx_thread.remove_exit_job(self.empty)
        mx.clear_cache()


def empty_abandoned(slot: ModelSlot) -> None:
    """Its engine became garbage: drop the model where it lives."""
    if not slot.filled:
        return
    mlx_thread.post(slot.empty)
    warnings.warn(
        "an engine was dropped without being stopped; use 'async with', or await stop()",
        ResourceWarning,
        stacklevel=2,
    )
