"""One request at a time."""

from __future__ import annotations

from mlx_engine.core.scheduler import SimpleScheduler
from mlx_engine.engine.local import LocalEngine
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.generation.request import Request


class SimpleEngine(LocalEngine):
    """Serves one request at a time, in the order in which they come.

    A request is one call on the MLX thread, from its first prefill chunk to its last token; its
    prompt is made into tokens before, on another thread.
    """

    _holder: ModelHolder

    def _new_holder(self) -> ModelHolder:
        return ModelHolder()

    def _new_scheduler(self) -> SimpleScheduler[Request]:
        holder = self._holder
        return SimpleScheduler(self._lifecycle, self._queue, holder.prepare, holder.generate)
