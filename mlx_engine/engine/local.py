"""Engines in this process: requests on the MLX thread."""

from __future__ import annotations

import abc
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from mlx_engine.config import (
    AsEngine,
    Decode,
    ModelConfig,
    QueueConfig,
    SpecPrefill,
    Strategies,
    path_text,
)
from mlx_engine.core.bridge import in_this_loop, off_loop
from mlx_engine.core.in_flight import RequestTicket
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.stream import Emit
from mlx_engine.engine.base import BaseEngine, checked_callback
from mlx_engine.engine.life import EngineLife
from mlx_engine.engine.model_holder import ModelHolder
from mlx_engine.engine.producer import RequestProducer
from mlx_engine.errors import GenerationError, MLXEngineError, describe, drop_frames
from mlx_engine.generation.request import Request
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits, checked_limits
from mlx_engine.models.loading import find_model
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.requests import GenerationRequest, checked_priority


class LocalEngine(EngineLife, BaseEngine):
    """A model in this process; the MLX thread does its work, one piece at a time."""

    _slot: ModelHolder
    _takes_priority = False

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        adapter_path: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        context_length: int | None = None,
        max_kv_size: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        prefill_step_size: int = 512,
        prompt_cache_bytes: int | None = None,
        prefill: SpecPrefill | None = None,
        decode: Decode = None,
        queue_limit: int | None = None,
        max_wait: float | None = None,
        limits: RequestLimits = DEFAULT_LIMITS,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Make an engine; nothing is loaded before it is started.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
            revision: branch, tag or commit of the repository.
            adapter_path: folder of LoRA adapters to apply.
            trust_remote_code: run Python code that the model brings along, and so do draft
                models, of which the newest revision is taken.
            context_length: tokens that prompt and answer may have together; ``None`` takes
                it from the model's configuration.
            max_kv_size: tokens that the KV cache keeps at most: the first 4 and the latest.
            kv_bits: bits of the quantised KV cache (2, 3, 4, 5, 6 or 8); ``None`` keeps full
                precision.
            kv_group_size: values that share a scale in it (32, 64 or 128).
            quantized_kv_start: tokens in the cache from which on it is quantised.
            prefill_step_size: tokens per prefill chunk; a cancelled request leaves MLX after
                the chunk that it is in.
            prompt_cache_bytes: bytes that earlier prompts and answers may take, so that they
                need no second prefill; 0 switches that off, ``None`` is a quarter of the
                device's memory that the model leaves, or 1 GiB where that is not known.
            prefill: ``SpecPrefill(...)`` leaves parts of long prompts out; ``None`` prefills
                all of them.
            decode: ``DraftModel(...)`` or ``MTP()`` proposes tokens, several of which the
                model verifies together; ``"auto"`` is ``MTP()`` where the model has a head;
                ``None`` decodes one token after another. In ``BatchedEngine`` it is for
                requests that are alone at the time.
            queue_limit: requests that may wait for their turn before ``EngineBusy`` is
                raised; ``None`` is no limit.
            max_wait: seconds that a request may wait for its turn before ``EngineBusy`` is
                raised; ``None`` is no limit.
            limits: how large a request may be; see ``RequestLimits``.
            on_progress: told of download and loading, in the event loop that starts the
                engine.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, or
                contradicts another one.
        """
        self.config = ModelConfig(
            model=path_text(model),
            revision=revision,
            adapter_path=None if adapter_path is None else path_text(adapter_path),
            trust_remote_code=trust_remote_code,
            context_length=context_length,
            max_kv_size=max_kv_size,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            prefill_step_size=prefill_step_size,
            prompt_cache_bytes=prompt_cache_bytes,
        )
        self.strategies = Strategies.of(prefill, decode)
        self._limits = checked_limits(limits)
        self._on_progress = checked_callback(on_progress)
        self._queue = QueueConfig(queue_limit=queue_limit, max_wait=max_wait)
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
        return _at_the_border(
            "saving the prompt cache", lambda: self._slot.space().save_prompt_cache(path)
        )

    def _load(self, path: Path) -> int:
        """On the MLX thread."""
        return _at_the_border(
            "loading the prompt cache", lambda: self._slot.space().load_prompt_cache(path)
        )

    def _check_strategies(
        self, prefill: SpecPrefill | AsEngine | None, decode: AsEngine | None
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


def _at_the_border(what: str, work: Callable[[], int]) -> int:
    """What MLX raises inside is told in an error of ours, without the frames that hold arrays."""
    try:
        return work()
    except MLXEngineError as error:
        drop_frames(error)
        raise
    except Exception as error:
        drop_frames(error)
        raise GenerationError(f"{what} failed: {describe(error)}") from error
