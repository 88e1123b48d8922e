"""Engines in this process: requests on the MLX thread."""

from __future__ import annotations

import abc
from pathlib import Path

from mlx_engine.asks import Ask
from mlx_engine.config import AsEngine, SpecPrefill
from mlx_engine.engine.admission import RequestTicket
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.crossing import in_this_loop
from mlx_engine.engine.life import EngineLife
from mlx_engine.generation import prompt_cache_file
from mlx_engine.generation.kv_cache import sample_kv_cache
from mlx_engine.generation.request import Request
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.stream import Emit


class LocalEngine(EngineLife, BaseEngine):
    """A model in this process; the MLX thread does its work, one piece at a time."""

    async def _save_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("save"))
        return await self._run_blocking_serialized(self._save, path, _ticket=ticket)

    async def _load_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("load"))
        return await self._run_blocking_serialized(self._load, path, _ticket=ticket)

    def _save(self, path: Path) -> int:
        """On the MLX thread."""
        space = self._slot.space()
        return prompt_cache_file.save(
            path, space.prompt_cache, prompt_cache_file.fingerprint(space.loaded)
        )

    def _load(self, path: Path) -> int:
        """On the MLX thread."""
        space = self._slot.space()
        return prompt_cache_file.load(
            path,
            space.prompt_cache,
            prompt_cache_file.fingerprint(space.loaded),
            sample_kv_cache(space.loaded.model, space.config),
        )

    def _check_strategies(
        self, prefill: SpecPrefill | AsEngine | None, decode: AsEngine | None
    ) -> None:
        self.strategies.of_request(prefill, decode)

    def _check_running(self) -> None:
        self._lifecycle.check_running()

    @property
    def _width(self) -> int:
        return 1

    def _producer(
        self, ask: Ask, on_progress: ProgressCallback | None, request_id: str | None = None
    ) -> _Producer:
        request = Request(
            ask.source,
            ask.params,
            request_id or self._lifecycle.new_id(),
            on_progress,
            ask.priority,
            self.strategies.of_request(ask.prefill, ask.decode),
        )
        return _Producer(self, request)

    async def _complete(self, request: Request, emit: Emit | None) -> GenerationResult:
        request.submitted(in_this_loop, emit)
        return await self._serve(request, RequestTicket(request.request_id))

    @abc.abstractmethod
    async def _serve(self, request: Request, ticket: RequestTicket) -> GenerationResult:
        """Do a request that somebody waits for."""


class _Producer:
    """A request as a stream sees it."""

    def __init__(self, engine: LocalEngine, request: Request) -> None:
        self.request_id = request.request_id
        self._engine = engine
        self._request = request

    async def run(self, emit: Emit | None) -> GenerationResult:
        return await self._engine._complete(self._request, emit)

    def cancel(self) -> None:
        self._request.cancel()

    def partial_result(self) -> GenerationResult:
        return self._request.result()
