"""Engines in this process: requests on the MLX thread."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable
from pathlib import Path

from mlx_engine.config import EngineConfig
from mlx_engine.core.bridge import in_this_loop, off_loop
from mlx_engine.core.in_flight import RequestTicket
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.stream import Emit
from mlx_engine.engine.base import BaseEngine, checked_callback
from mlx_engine.engine.life import EngineLife
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.engine.producer import RequestProducer
from mlx_engine.errors import GenerationError, MLXEngineError, describe, drop_frames
from mlx_engine.generation.cache import prompt_cache_file
from mlx_engine.generation.cache.kv_cache import sample_kv_cache
from mlx_engine.generation.request import Request
from mlx_engine.models.loading import find_model
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.requests import GenerationRequest, checked_priority
from mlx_engine.strategies import EngineDefault, SpecPrefill


class LocalEngine(EngineLife, BaseEngine):
    """A model in this process; the MLX thread does its work, one piece at a time."""

    _slot: ModelHolder
    _takes_priority = False

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback | None) -> None:
        self.config = config.model
        self.strategies = config.strategies
        self._limits = config.limits
        self._on_progress = checked_callback(on_progress)
        self._queue = config.queue
        super().__init__(self._new_slot(), self._queue)

    def _new_slot(self) -> ModelHolder:
        return ModelHolder()

    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        progress = in_this_loop(self._on_progress)
        sources = {}
        for model in (self.config, *map(self.config.for_draft, self.strategies.drafts)):
            if model.model in sources:  # its own draft, of the same revision
                continue
            find = functools.partial(find_model, model, progress, should_stop)
            sources[model.model] = await off_loop(find, stop)
        if stop.is_set():
            raise Interrupted
        await self._run_blocking_serialized(
            self._slot.fill,
            self.config,
            self.strategies,
            sources,
            progress,
            should_stop,
            on_cancel=stop.set,
        )

    async def _save_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("save"), reported=False)
        return await self._run_blocking_serialized(self._save, path, _ticket=ticket)

    async def _load_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("load"), reported=False)
        return await self._run_blocking_serialized(self._load, path, _ticket=ticket)

    def _prepare(self, request: Request) -> MLXEngineError | None:
        """On a thread of the preparer: no MLX."""
        try:
            request.prepare(self._slot.vocabulary)
        except Interrupted:
            pass  # its turn, if it still gets one, ends it
        except BaseException as error:  # noqa: BLE001 - the border: templates raise anything
            return request.failed(error)
        return None

    def _save(self, path: Path) -> int:
        """On the MLX thread."""
        return _at_the_border("saving the prompt cache", _save, self._slot, path)

    def _load(self, path: Path) -> int:
        """On the MLX thread."""
        return _at_the_border("loading the prompt cache", _load, self._slot, path)

    def _check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        self.strategies.of_request(prefill, decode)

    @property
    def _width(self) -> int:
        return 1

    def _producer(
        self,
        ask: GenerationRequest,
        on_progress: ProgressCallback | None,
        request_id: str | None = None,
    ) -> RequestProducer:
        checked_priority(ask.priority, self._takes_priority)
        request = Request(
            ask.source,
            ask.params,
            request_id or self._lifecycle.new_id(),
            on_progress,
            ask.priority,
            self.strategies.of_request(ask.prefill, ask.decode),
        )
        return RequestProducer(request, functools.partial(self._complete, request))

    async def _complete(self, request: Request, emit: Emit | None) -> GenerationResult:
        request.submitted(in_this_loop, emit)
        return await self._serve(request, RequestTicket(request.request_id))

    @abc.abstractmethod
    async def _serve(self, request: Request, ticket: RequestTicket) -> GenerationResult:
        """Do a request that somebody waits for."""


def _save(slot: ModelHolder, path: Path) -> int:
    space = slot.space()
    return prompt_cache_file.save(
        path, space.prompt_cache, prompt_cache_file.fingerprint(space.loaded)
    )


def _load(slot: ModelHolder, path: Path) -> int:
    space = slot.space()
    return prompt_cache_file.load(
        path,
        space.prompt_cache,
        prompt_cache_file.fingerprint(space.loaded),
        sample_kv_cache(space.loaded.model, space.config),
    )


def _at_the_border(
    what: str, work: Callable[[ModelHolder, Path], int], slot: ModelHolder, path: Path
) -> int:
    """What MLX raises inside is told in an error of ours, without the frames that hold arrays."""
    try:
        return work(slot, path)
    except MLXEngineError as error:
        drop_frames(error)
        raise
    except Exception as error:
        drop_frames(error)
        raise GenerationError(f"{what} failed: {describe(error)}") from error
