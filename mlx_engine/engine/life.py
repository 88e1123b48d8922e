"""The life of an engine, its queue, and the one way into MLX."""

from __future__ import annotations

import abc
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from mlx_engine.checks import shown
from mlx_engine.config import QueueConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.drain import clean_up, finish, is_destroyed
from mlx_engine.core.event_loop import running_loop
from mlx_engine.core.in_flight import Admission, RequestTicket
from mlx_engine.core.lifecycle import Lifecycle, Ticket
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.preparer import Preparer, Preparing
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.work import PendingWork, ThreadJob
from mlx_engine.errors import EngineStopped, InvalidRequest, MLXEngineError
from mlx_engine.outputs import EngineState, EngineStats, PromptCacheStats, ShutdownReport

T = TypeVar("T")


class Slot(Protocol):
    """Where an engine keeps its model; filled, used and emptied on the MLX thread.

    Attributes:
        meter: counters of the work done with it. From any thread.
    """

    meter: EngineCounters

    @property
    def filled(self) -> bool:
        """Whether there is a model in it. From any thread."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model in it has a chat template. From any thread."""

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together, if limited. From any thread."""

    def prompt_cache_stats(self) -> PromptCacheStats:
        """Of its prompt cache. From any thread."""

    def empty(self) -> None:
        """Drop the model. On the MLX thread."""


class NoModel:
    """A slot as long as there is nothing yet to keep a model in."""

    filled = has_chat_template = False
    context_length = None

    def __init__(self) -> None:
        self.meter = EngineCounters()

    def prompt_cache_stats(self) -> PromptCacheStats:
        """See ``Slot``."""
        return PromptCacheStats()

    def empty(self) -> None:
        """See ``Slot``."""


class EngineLife(abc.ABC):
    """Loads a model, lets work take its turn on the MLX thread, and lets go of the model.

    No MLX here: what kind of model it is, and how it is loaded, is its heirs' affair.
    """

    def __init__(self, slot: Slot | None, limits: QueueConfig) -> None:
        """An engine that is to fill ``slot`` when it starts; ``None`` if it makes one then."""
        self._lifecycle = Lifecycle()
        self._admission = Admission(self._lifecycle, limits)
        self._preparer: Preparer[Any] = Preparer(mlx_thread)
        self._slot: Slot = NoModel()
        if slot is not None:
            self._hold(slot)

    @property
    def _is_holding(self) -> bool:
        return not isinstance(self._slot, NoModel)

    def _hold(self, slot: Slot) -> None:
        """Have a place for the model from now on."""
        self._slot = slot
        # An engine that is forgotten must not drop its model on a foreign thread.
        self._finalizer = weakref.finalize(self, empty_abandoned, slot)
        self._finalizer.atexit = False  # the MLX thread's exit job does it then

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
            state=self.state,
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
            EngineNotStarted: the start that another task had begun did not succeed.
            EngineDead: the engine has failed; ``stop()`` it first. Or there is no thread for it.
            RuntimeError: this process was forked from one that has used MLX.
        """
        mlx_thread.check_fork()
        stop = threading.Event()

        def abort(_: MLXEngineError) -> bool:
            stop.set()
            return True

        loop = running_loop()

        def should_stop() -> bool:
            return stop.is_set() or loop.is_closed()

        ticket = Ticket(self._lifecycle.new_id("start"), loop=loop, reported=False)
        if not await self._lifecycle.begin_start(ticket, abort):
            return
        try:
            await self._load_model(stop, should_stop)
            if not self._lifecycle.start_succeeded(ticket):
                raise Interrupted
        except BaseException as error:
            if self._lifecycle.is_starter(ticket):  # else the slot is another start's by now
                if is_destroyed(error):
                    self._release_soon()
                await clean_up(error, self._release)
            if isinstance(error, Interrupted):  # not by a cancellation, that is another error
                raise EngineStopped("the engine was stopped while it was loading") from None
            raise
        finally:
            self._lifecycle.start_failed(ticket)
            self._lifecycle.done(ticket)

    @abc.abstractmethod
    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        """Find the model, and put it into the slot on the MLX thread.

        Args:
            stop: set when the load should end early; to be set if it is cancelled.
            should_stop: whether it should; also if nobody waits any more.

        Raises:
            Interrupted: it has ended early.
            Exception: what ``start`` then raises.
        """

    @abc.abstractmethod
    def _prepare(self, request: Any) -> MLXEngineError | None:
        """Make a request ready for its turn, on a thread of the preparer; the error if that fails.

        It holds no model there, and does no MLX work.
        """

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
        if not callable(func) or inspect.iscoroutinefunction(func):
            raise InvalidRequest("func", f"must be a synchronous function, not {shown(func)}")
        ticket = RequestTicket(self._lifecycle.new_id("call"), reported=False)
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
        _prepare: Callable[[], MLXEngineError | None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Run ``func`` on the MLX thread. All work that somebody waits for goes through here.

        Takes the generation lock in the order of arrival, and holds it until ``func`` has
        returned, whatever happens to the caller meanwhile; see ``MLXThread.run``.

        Args:
            _prepare: done before, on a thread of the preparer; see ``Preparing``.
        """
        ticket = _ticket or Ticket(self._lifecycle.new_id("work"), reported=False)
        turn = ThreadJob(
            functools.partial(func, *args, **kwargs),
            on_cancel,
            functools.partial(self._admission.over, ticket),
            lane=self._admission,
        )
        preparing = None if _prepare is None else Preparing(self._preparer, turn, _prepare)
        with self._admission.enter(ticket, turn, mlx_thread):
            return await mlx_thread.run(turn, preparing)  # type: ignore[no-any-return]

    def _run_unattended(
        self, func: Callable[[threading.Event], None], on_done: Callable[[PendingWork[None]], None]
    ) -> ThreadJob[None]:
        """Queue a turn that nobody waits for, in the same line. From any thread.

        Args:
            func: given an event that is set when it should return early.
            on_done: called when the turn is over, from any thread.

        Raises:
            EngineDead: the interpreter is shutting down.
        """
        stop = threading.Event()
        turn = ThreadJob(functools.partial(func, stop), stop.set, on_done, attended=False)
        mlx_thread.submit(turn)
        return turn

    def _check_running(self) -> None:
        self._lifecycle.check_running()

    async def _release(self) -> None:
        """Drop the model, on the MLX thread; not to be cut short."""

        async def release() -> None:
            if self._slot.filled:
                ticket = Ticket(self._lifecycle.new_id("work"), abortable=False)
                await self._run_blocking_serialized(self._slot.empty, _ticket=ticket)

        try:
            await finish(release)
        finally:
            self._release_soon()  # if this coroutine is being destroyed, or that has failed

    def _release_soon(self) -> None:
        """Drop the model, on the MLX thread, if it is still there; nobody waits for it."""
        if self._slot.filled:
            mlx_thread.post(self._slot.empty)


def empty_abandoned(slot: Slot) -> None:
    """Its engine became garbage: drop the model where it lives."""
    if not slot.filled:
        return
    mlx_thread.post(slot.empty)
    warnings.warn(
        "an engine was dropped without being stopped; use 'async with', or await stop()",
        ResourceWarning,
        stacklevel=2,
    )
