"""Engines in this process: their life, and the one way into MLX."""

from __future__ import annotations

import abc
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.checks import shown
from mlx_engine.config import QueueConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.drain import clean_up, finish, is_destroyed
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.scheduler import Scheduler
from mlx_engine.core.sliced_job import Rest
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineStopped, InvalidRequest, MLXEngineError
from mlx_engine.memory_stats import MemoryStats
from mlx_engine.outputs import (
    EngineState,
    EngineStats,
    ShutdownReport,
)
from mlx_engine.questions import PromptFacts, PromptQuestion

T = TypeVar("T")


class Holder(Protocol):
    """Holder of an engine's model; loaded, used and unloaded on the MLX thread.

    Attributes:
        counters: of the work done with it. From any thread.
    """

    counters: EngineCounters

    @property
    def loaded(self) -> bool:
        """Whether there is a model in it. From any thread."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model in it has a chat template. From any thread."""

    @property
    def supports_tools(self) -> bool:
        """Whether calls of tools can be read. From any thread."""

    @property
    def supports_reasoning(self) -> bool:
        """Whether reasoning can be told from the answer. From any thread."""

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""

    def answer(self, question: PromptQuestion) -> PromptFacts:
        """Answer a question about a prompt. On any thread, without MLX."""

    def prompt_cache_stats(self) -> PromptCacheStats:
        """Counters of the prompt cache. From any thread."""

    def memory_stats(self) -> MemoryStats:
        """Memory that it has, and may have. From any thread."""

    def save_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to write the prompt cache into a file; the rest gives the number of prompts.

        On the MLX thread.
        """

    def load_prompt_cache(self, path: Path) -> Rest[int]:
        """Begin to add the prompts of a file to the prompt cache; the rest gives their number.

        On the MLX thread.
        """

    def unload(self) -> None:
        """Drop the model. On the MLX thread."""


class InProcessEngine(BaseEngine):
    """An engine in this process: it loads a model, has a scheduler, and lets go of the model.

    No MLX here: what kind of model it is, and how it is loaded, is its heirs' affair.
    """

    def __init__(self, holder: Holder, limits: QueueConfig, model: str) -> None:
        """Make an engine that is to load a model into ``holder`` when it starts.

        Args:
            model: its name.
        """
        self._model = model
        self._lifecycle = Lifecycle(f"{type(self).__name__} of {model!r}")
        self._holder = holder
        self.queue_limits = limits
        self._scheduler: Scheduler[Any] = self._new_scheduler()
        # An engine that is forgotten must not drop its model on a foreign thread.
        self._finalizer = weakref.finalize(self, unload_abandoned, self._holder)
        self._finalizer.atexit = False  # the MLX thread's exit job does it then

    @abc.abstractmethod
    def _new_scheduler(self) -> Scheduler[Any]:
        """Make the scheduler; holder and life cycle are there."""

    @property
    def state(self) -> EngineState:
        return self._lifecycle.state

    @property
    def has_chat_template(self) -> bool:
        return self._holder.has_chat_template

    @property
    def model(self) -> str:
        return self._model

    @property
    def supports_tools(self) -> bool:
        return self._holder.supports_tools

    @property
    def supports_reasoning(self) -> bool:
        return self._holder.supports_reasoning

    @property
    def context_length(self) -> int | None:
        return self._holder.context_length

    @property
    def width(self) -> int:
        return self._scheduler.width

    @property
    def counters(self) -> EngineCounters:
        """Counters of the work done with the model. From any thread."""
        return self._holder.counters

    def stats(self) -> EngineStats:
        counters = self._holder.counters
        return EngineStats(
            state=self.state,
            **self._scheduler.admission.counts(),
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            completion_tokens=counters.completion_tokens,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
            batch_size=counters.batch_size,
            kv_bytes=counters.kv_bytes,
            prompt_cache=self._holder.prompt_cache_stats(),
            memory=self._holder.memory_stats(),
            preemptions=counters.preemptions,
        )

    async def start(self) -> None:
        mlx_thread.check_fork()
        stop = threading.Event()

        def abort(_: MLXEngineError) -> bool:
            stop.set()
            return True

        loop = running_loop()

        def should_stop() -> bool:
            return stop.is_set() or loop.is_closed()

        entry = InFlight(self._lifecycle.new_id("start"), loop=loop)
        entry.abort = abort
        if not await self._lifecycle.begin_start(entry):
            return
        try:
            await self._load_model(stop, should_stop)
            if not self._lifecycle.start_succeeded(entry):
                raise Interrupted
        except BaseException as error:
            if self._lifecycle.is_starter(entry):  # else the holder is another start's by now
                if is_destroyed(error):
                    self._release_soon()
                await clean_up(error, self._release)
            if isinstance(error, Interrupted):  # not by a cancellation, that is another error
                raise EngineStopped("the engine was stopped while it was loading") from None
            raise
        finally:
            self._lifecycle.start_failed(entry)
            self._lifecycle.in_flight.remove(entry)

    @abc.abstractmethod
    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        """Find the model, and load it into the holder on the MLX thread.

        Args:
            stop: set when the load should end early; to be set if it is cancelled.
            should_stop: whether it should; also if nobody waits any more.

        Raises:
            Interrupted: it has ended early.
            Exception: what ``start`` then raises.
        """

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        if mlx_thread.is_current():
            raise RuntimeError(
                "this code runs inside a job on the MLX thread, and a shutdown would wait for "
                "it for ever: shut the engine down from outside"
            )
        return await self._lifecycle.shutdown(timeout, self._release)

    async def _clear_failure(self) -> None:
        await self._lifecycle.clear_failure(self._release)

    async def failed(self) -> Exception:
        """Wait until the engine cannot serve any more; gives what requests are told then.

        Cancellation: ends the waiting.
        """
        return await self._lifecycle.failed()

    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        if not callable(func) or inspect.iscoroutinefunction(func):
            raise InvalidRequest("func", f"must be a synchronous function, not {shown(func)}")
        entry = InFlight(self._lifecycle.new_id("call"), counted=True)
        return await self._run_blocking_serialized(
            func, *args, on_cancel=on_cancel, _entry=entry, **kwargs
        )

    async def answer(self, question: PromptQuestion) -> PromptFacts:
        work = functools.partial(self._holder.answer, question)
        return await self._scheduler.run_beside(question.subject, work)

    async def _save_prompt_cache(self, path: Path) -> int:
        begin = functools.partial(self._holder.save_prompt_cache, path)
        return await self._scheduler.run_sliced("save", begin)

    async def _load_prompt_cache(self, path: Path) -> int:
        begin = functools.partial(self._holder.load_prompt_cache, path)
        return await self._scheduler.run_sliced("load", begin)

    def _run_blocking_serialized(
        self, func: Callable[..., T], /, *args: Any, **options: Any
    ) -> Awaitable[T]:
        """Run ``func`` on the MLX thread; see ``Scheduler.run_blocking_serialized``."""
        return self._scheduler.run_blocking_serialized(func, *args, **options)

    def check_running(self) -> None:
        self._lifecycle.check_running()

    async def _release(self) -> None:
        """Drop the model, on the MLX thread; not to be cut short."""

        async def release() -> None:
            if self._holder.loaded:
                entry = InFlight(self._lifecycle.new_id("work"), abortable=False)
                await self._run_blocking_serialized(self._holder.unload, _entry=entry)

        try:
            await finish(release)
        finally:
            self._release_soon()  # if this coroutine is being destroyed, or that has failed

    def _release_soon(self) -> None:
        """Drop the model, on the MLX thread, if it is still there; nobody waits for it."""
        if self._holder.loaded:
            mlx_thread.post(self._holder.unload)


def unload_abandoned(holder: Holder) -> None:
    """Drop the model of an engine that became garbage, where it lives."""
    if not holder.loaded:
        return
    mlx_thread.post(holder.unload)
    warnings.warn(
        "an engine was dropped without being stopped; use 'async with', or await stop()",
        ResourceWarning,
        stacklevel=2,
    )
