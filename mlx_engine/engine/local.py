"""Engines in this process: requests on the MLX thread."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable

from mlx_engine.config import EngineConfig
from mlx_engine.core.bridge import checked_callback, in_this_loop, off_loop
from mlx_engine.core.ledger import ledger
from mlx_engine.core.reclaim import reclaim
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.engine.base import checked_formats
from mlx_engine.engine.in_process import InProcessEngine
from mlx_engine.engine.late import import_mlx, mlx_is_imported
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.generation.request import Request
from mlx_engine.outputs import ProgressCallback
from mlx_engine.requests import GenerationRequest, checked_priority
from mlx_engine.strategies import EngineDefault, SpecPrefill


class LocalEngine(InProcessEngine):
    """A model in this process; the MLX thread does its work, one piece at a time."""

    _holder: ModelHolder
    takes_priority = False

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback | None) -> None:
        self._config = checked_formats(config)
        self.limits = config.limits
        self._on_progress = checked_callback(on_progress)
        super().__init__(self._new_holder(), config.queue, config.model.model)

    @abc.abstractmethod
    def _new_holder(self) -> ModelHolder:
        """Make what is to hold the model."""

    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        if not mlx_is_imported():  # that takes seconds, in which this event loop goes on
            await self._run_blocking_serialized(import_mlx, on_cancel=stop.set)
        model, strategies = self._config.model, self._config.strategies
        progress = in_this_loop(self._on_progress)
        find = functools.partial(self._holder.find, model, strategies, progress, should_stop)
        sources = await off_loop(find, stop)
        await reclaim(ledger(), sum(map(stored_bytes, sources.values())))
        if stop.is_set():
            raise Interrupted
        await self._run_blocking_serialized(
            self._holder.load,
            model,
            strategies,
            sources,
            progress,
            should_stop,
            on_cancel=stop.set,
        )

    def limit_memory(self, nbytes: int | None, owner: str = "") -> None:
        """Have ``nbytes`` at most of the memory, whatever else is said. From any thread.

        Args:
            nbytes: ``None`` takes nothing back.
            owner: what the engine is called in ``stats().memory``.
        """
        self._holder.memory.owner = owner or self._holder.memory.owner
        self._holder.memory.limit(nbytes)

    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        self._config.strategies.of_request(prefill, decode)

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> Request:
        checked_priority(request.priority, self.takes_priority)
        return Request(
            request,
            request_id or self._lifecycle.new_id(),
            on_progress,
            self._scheduler.serve,
            self._config.strategies.of_request(request.prefill, request.decode),
        )
