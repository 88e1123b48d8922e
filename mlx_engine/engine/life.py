"""The life of an engine, its queue, and the one way into MLX."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from mlx_engine.config import (
    Decode,
    ModelConfig,
    QueueConfig,
    SpecPrefill,
    Strategies,
    path_text,
)
from mlx_engine.engine.admission import Admission, RequestTicket
from mlx_engine.engine.base import checked_callback
from mlx_engine.engine.crossing import in_this_loop, off_loop
from mlx_engine.engine.slot import ModelSlot, empty_abandoned
from mlx_engine.errors import EngineStopped, InvalidRequest, MLXEngineError
from mlx_engine.lifecycle import EngineState, Lifecycle, Ticket
from mlx_engine.models.loading import find_model
from mlx_engine.outputs import (
    EngineStats,
    ProgressCallback,
    ShutdownReport,
)
from mlx_engine.turn import Interrupted, Pending, Turn, first_cancellation, outlast
from mlx_engine.worker import mlx_thread

T = TypeVar("T")


class EngineLife:
    """Loads a model, lets work take its turn on the MLX thread, and lets go of the model."""

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
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Make an engine; nothing is loaded before it is started.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
            revision: branch, tag or commit of the repository.
            adapter_path: folder of LoRA adapters to apply.
            trust_remote_code: run Python code that the model brings along.
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
        self._on_progress = checked_callback(on_progress)
        self._lifecycle = Lifecycle()
        self._admission = Admission(
            self._lifecycle, QueueConfig(queue_limit=queue_limit, max_wait=max_wait)
        )
        self._slot = self._new_slot()
        # An engine that is forgotten must not drop its model on a foreign thread.
        self._finalizer = weakref.finalize(self, empty_abandoned, self._slot)
        self._finalizer.atexit = False  # the MLX thread's exit job does it then

    def _new_slot(self) -> ModelSlot:
        return ModelSlot()

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life. From any thread."""
        return self._lifecycle.state

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used. ``False`` while no model is loaded. From any thread."""
        return self._slot.has_chat_template

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None`` if there is no limit, or
        no model is loaded. From any thread.
        """
        return self._slot.context_length

    def stats(self) -> EngineStats:
        """A snapshot of counters. Cheap; from any thread."""
        meter = self._slot.meter
        return EngineStats(
            state=self.state.value,
            **self._admission.counts(),
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            completion_tokens=meter.completion_tokens,
            draft_tokens=meter.draft_tokens,
            accepted_tokens=meter.accepted_tokens,
            prefill_seconds=meter.prefill_seconds,
            decode_seconds=meter.decode_seconds,
            batch_size=meter.batch_size,
            kv_bytes=meter.kv_bytes,
            prompt_cache=self._slot.prompt_cache_stats(),
        )

    async def start(self) -> None:
        """Find, if need be download, and load the model. No-op when the engine runs.

        Cancellation: the load ends at its next piece of weights or of the download; nothing
        stays behind, and the engine can be started again.

        Raises:
            ModelLoadError: the model cannot be found or loaded; start may be tried again.
            InvalidRequest: an option does not suit the model.
            EngineStopped: the engine is being shut down.
        """
        stop = threading.Event()

        def abort(_: MLXEngineError) -> bool:
            stop.set()
            return True

        loop = asyncio.get_running_loop()

        def should_stop() -> bool:
            return stop.is_set() or loop.is_closed()

        ticket = Ticket(self._lifecycle.new_id("start"), loop=loop)
        if not await self._lifecycle.begin_start(ticket, abort):
            return
        try:
            progress = in_this_loop(self._on_progress)
            sources = {}
            for model in (self.config, *map(self.config.for_draft, self.strategies.drafts)):
                find = functools.partial(find_model, model, progress, should_stop)
                sources[model.model] = await off_loop(find, stop)
            if not ticket.aborted:
                await self._run_blocking_serialized(
                    self._slot.fill,
                    self.config,
                    self.strategies,
                    sources,
                    progress,
                    should_stop,
                    on_cancel=stop.set,
                )
            if not self._lifecycle.start_succeeded():
                raise Interrupted
        except BaseException as error:
            with first_cancellation(error):
                await self._release()
            if isinstance(error, Interrupted):  # not by a cancellation, that is another error
                raise EngineStopped("the engine was stopped while it was loading") from None
            raise
        finally:
            self._lifecycle.start_failed()
            self._lifecycle.done(ticket)

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Refuse new requests from now on, let those in flight finish, release the model.

        Args:
            timeout: seconds that requests in flight may take; then they are aborted and
                their callers get ``EngineStopped``. ``None`` waits for all of them, 0 for
                none. An engine that is still loading stops loading at once.

        Returns:
            Which requests finished, and which were aborted.

        May be called any number of times, from several tasks: the earliest deadline counts.
        The model is dropped on the MLX thread, when its turn comes: work of other engines
        that is there already is waited for.

        Cancellation: requests still in flight are aborted, the model is released, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
            RuntimeError: called from inside a turn on the MLX thread.
        """
        if mlx_thread.is_current():
            raise RuntimeError(
                "this code runs inside a turn on the MLX thread, and a shutdown would wait for "
                "it for ever: shut the engine down from outside"
            )
        return await self._lifecycle.shutdown(timeout, self._release)

    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Run a function of your own on the MLX thread, when its turn comes.

        It must be synchronous, and is free to use MLX. It sees the caller's context
        variables.

        Args:
            on_cancel: called once, from any thread, if the call is cancelled while the
                function runs; it should make the function return soon.

        Cancellation: waiting, the call leaves the queue at once. Once the function runs, the
        call stays until it has returned, however often it is cancelled; the outcome is
        discarded and ``CancelledError`` raised.

        Raises:
            RuntimeError: called from inside another turn on the MLX thread.
            InvalidRequest: ``func`` is not a plain function.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
            BaseException: whatever the function raises.
        """
        if not callable(func) or asyncio.iscoroutinefunction(func):
            raise InvalidRequest("func", f"must be a synchronous function, not {func!r}")
        ticket = RequestTicket(self._lifecycle.new_id("call"))
        return await self._run_blocking_serialized(
            func, *args, on_cancel=on_cancel, _ticket=ticket, **kwargs
        )

    async def _run_blocking_serialized(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        _ticket: Ticket | None = None,
        **kwargs: Any,
    ) -> T:
        """Run ``func`` on the MLX thread. All work that somebody waits for goes through here.

        Takes the generation lock in the order of arrival, and holds it until ``func`` has
        returned, whatever happens to the caller meanwhile; see ``MLXThread.run``.
        """
        ticket = _ticket or Ticket(self._lifecycle.new_id("work"))
        turn = Turn(
            functools.partial(func, *args, **kwargs),
            on_cancel,
            functools.partial(self._admission.over, ticket),
        )
        with self._admission.enter(ticket, turn, mlx_thread):
            return await mlx_thread.run(turn)  # type: ignore[no-any-return]

    def _run_unattended(
        self, func: Callable[[threading.Event], None], on_done: Callable[[Pending[None]], None]
    ) -> Turn[None]:
        """Queue a turn that nobody waits for, in the same line. From any thread.

        Args:
            func: given an event that is set when it should return early.
            on_done: called when the turn is over, from any thread.

        Raises:
            EngineDead: the interpreter is shutting down.
        """
        stop = threading.Event()
        turn = Turn(functools.partial(func, stop), stop.set, on_done, attended=False)
        mlx_thread.submit(turn)
        return turn

    async def _release(self) -> None:
        """Drop the model, on the MLX thread; not to be cut short."""
        if not self._slot.filled:
            return
        ticket = Ticket(self._lifecycle.new_id("work"), abortable=False)
        release = self._run_blocking_serialized(self._slot.empty, _ticket=ticket)
        try:
            await outlast(asyncio.ensure_future(release))
        finally:
            if self._slot.filled:  # the end of the event loop has cancelled that task as well
                mlx_thread.post(self._slot.empty)
