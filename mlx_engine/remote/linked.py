"""An engine elsewhere, with the interface of one that is here."""

from __future__ import annotations

import abc
import asyncio
import functools
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mlx_engine.checks import shown
from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.drain import clean_up, finish, is_destroyed
from mlx_engine.core.event_loop import running_loop
from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import EngineState, Lifecycle, checked_timeout
from mlx_engine.core.stream import Emit
from mlx_engine.core.work import PendingWork
from mlx_engine.engine.base import BaseEngine, checked_callback
from mlx_engine.errors import EngineNotRunning, EngineStopped, InvalidRequest, MLXEngineError
from mlx_engine.outputs import (
    EngineStats,
    ProgressCallback,
    PromptCacheStats,
    ShutdownReport,
)
from mlx_engine.remote.calls import Answer, Call
from mlx_engine.remote.connection import Connection
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.health import Health, health_of
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.remote_request import RemoteRequest
from mlx_engine.remote.totals import bygone
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.heartbeat import Beat, Watchdog
from mlx_engine.remote.wire.messages import CacheFile, Welcome, encode_strictly
from mlx_engine.requests import GenerationRequest, checked_priority

T = TypeVar("T")


class LinkedEngine(BaseEngine):
    """What every engine elsewhere has in common: requests go over a link, and are watched.

    Attributes:
        name: for logs, and among the arguments of its process.
        frame_limit: bytes that a request may take.
    """

    frame_limit: ClassVar[int] = MAX_FRAME

    def __init__(
        self, name: str, watchdog: Watchdog | None, on_progress: ProgressCallback | None
    ) -> None:
        if watchdog is not None and not isinstance(watchdog, Watchdog):
            raise InvalidRequest(
                "watchdog", f"must be Watchdog(...) or None, not {shown(watchdog)}"
            )
        if not isinstance(name, str) or not name.isprintable():
            raise InvalidRequest("name", f"must be a printable string, not {shown(name)}")
        self.name = name
        self._watchdog = watchdog
        self._on_progress = checked_callback(on_progress)
        self._lifecycle = Lifecycle()
        self._connection: Connection | None = None
        self._finalizer: weakref.finalize[[Connection], LinkedEngine] | None = None
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In a fork of this process: what runs the engine is the other one's, which has it."""
        if self._connection is not None and self._connection.exit is None:
            self._connection = None

    @abc.abstractmethod
    def _make_link(self) -> Callable[[], Link]:
        """What makes a link, in the I/O loop; it must not hold this engine."""

    @abc.abstractmethod
    def _greeting(self) -> bytes:
        """The first frame."""

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life. From any thread."""
        return self._lifecycle.state

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used. ``False`` while no model is loaded. From any thread."""
        return self._welcome is not None and self._welcome.has_chat_template

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None`` if there is no limit, or
        no model is loaded. From any thread.
        """
        return None if self._welcome is None else self._welcome.context_length

    @property
    def last_exit(self) -> Exit | None:
        """How the process behind it has ended, if it has. From any thread."""
        return None if self._connection is None else self._connection.exit

    def stats(self) -> EngineStats:
        """The latest that the engine has told: after each request, and four times a second.

        Counters begin at 0 when what runs the engine starts: with ``start``, or with the host.
        Cheap; from any thread.
        """
        connection = self._connection
        told = (connection.stats if connection else None) or _NOTHING_YET
        if connection is not None and connection.exit is not None:
            told = bygone(told)
        return replace(told, state=self.state.value)

    def check_health(self) -> Health:
        """Whether its latest step is recent, if there is anything to do. From any thread."""
        connection, now = self._connection, time.monotonic()
        last_beat = now if connection is None else connection.last_beat
        beat = Beat() if connection is None else connection.beat
        return health_of(
            self.state, now, last_beat, beat, self._watchdog or Watchdog(), self.last_exit
        )

    async def start(self) -> None:
        """Start what runs the engine, which loads the model. No-op when the engine runs.

        Cancellation: what has been started is killed; nothing stays behind, and the engine can
        be started again.

        Raises:
            ModelLoadError, InvalidRequest: as raised by the engine itself.
            EngineDead: what runs it has ended, or makes no progress; or a thread, a file or a
                process cannot be had for it, and it says what to do.
            EngineStopped: the engine is being shut down.
            EngineNotStarted: the start that another task had begun did not succeed.
            RuntimeError: this process was forked from one that uses engines elsewhere.
        """
        io_thread.check_fork()
        lifecycle = self._lifecycle
        ticket = InFlight(lifecycle.new_id("start"), loop=running_loop())
        connection = Connection(
            self.name,
            self._make_link(),
            self._greeting(),
            self._watchdog,
            in_this_loop(self._on_progress),
            functools.partial(_drain, lifecycle),
            functools.partial(_end, lifecycle),
        )

        def abort(_: MLXEngineError) -> bool:
            connection.end_by(time.monotonic())
            return True

        ticket.abort = abort
        if not await lifecycle.begin_start(ticket):
            return
        try:
            self._connection = connection
            await io_thread.run(connection.open)
            if connection.exit is not None:
                raise connection.exit.error()
            if not lifecycle.start_succeeded(ticket):
                raise EngineStopped(_STOPPED_LOADING)
            if connection.exit is not None:  # in the last moment: it has been running
                _end(lifecycle, connection.exit)
            self._finalizer = weakref.finalize(self, _abandoned, connection)
            self._finalizer.atexit = False
        except BaseException as error:
            if is_destroyed(error):
                connection.kill()
            await clean_up(error, functools.partial(self._release, connection, patience=0.0))
            if lifecycle.state is EngineState.DRAINING and isinstance(error, EngineNotRunning):
                raise EngineStopped(_STOPPED_LOADING) from None
            raise
        finally:
            lifecycle.start_failed(ticket)
            lifecycle.in_flight.remove(ticket)

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Refuse new requests from now on, let those in flight finish, end what runs the engine.

        Args:
            timeout: seconds that requests in flight may take; then they are aborted and
                their callers get ``EngineStopped``. ``None`` waits for all of them, 0 for
                none. What does not end by then is killed, so that this returns at most one
                second after the deadline, whatever the engine is stuck in.

        Returns:
            Which requests finished, and which were aborted.

        May be called any number of times, from several tasks: the earliest deadline counts.

        Cancellation: requests still in flight are aborted, the engine is ended, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
        """
        timeout = checked_timeout(timeout)
        running_loop()
        connection = self._connection
        if connection is not None:
            connection.end_by(None if timeout is None else time.monotonic() + timeout)
        return await self._lifecycle.shutdown(timeout, functools.partial(self._release, connection))

    async def wait_exit(self) -> Exit:
        """Wait until what runs the engine is gone, and tell how it ended.

        Raises:
            EngineNotStarted: it has never been started.
        """
        running_loop()
        connection = self._connection
        if connection is None or not connection.opened:
            self._lifecycle.check_running()
        assert connection is not None
        return await io_thread.run(connection.exited)

    def kill(self) -> None:
        """End what runs the engine now; requests get ``EngineDead``. From any thread."""
        if self._connection is not None:
            self._connection.kill()

    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Not possible: a function cannot go to another process.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest(
            "func",
            "a function cannot go to the engine's process; use SimpleEngine or BatchedEngine to "
            "run MLX functions of your own",
        )

    async def _release(self, connection: Connection | None, patience: float | None = None) -> None:
        """Wait until what runs the engine is gone; not to be cut short."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if connection is None or not connection.opened or connection.exit is not None:
            return
        closed = functools.partial(connection.closed, patience)
        await finish(lambda: io_thread.run(closed))

    def check_running(self) -> None:
        self._lifecycle.check_running()

    @property
    def width(self) -> int:
        return 1 if self._welcome is None else self._welcome.width

    @property
    def _welcome(self) -> Welcome | None:
        """What the engine has said of itself, as long as it is there."""
        connection = self._connection
        return None if connection is None or connection.exit is not None else connection.welcome

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> RemoteRequest:
        self._check_strategies(request.prefill, request.decode)
        checked_priority(request.priority, self._takes_priority)
        return RemoteRequest(self, request, on_progress, request_id or self._lifecycle.new_id())

    async def _save_prompt_cache(self, path: Path) -> int:
        return await self._cache_file("save", path)

    async def _load_prompt_cache(self, path: Path) -> int:
        return await self._cache_file("load", path)

    async def _cache_file(self, action: Any, path: Path) -> int:
        def frame(number: int) -> bytes:
            try:
                return encode_strictly([CacheFile(number, action, self._file_there(path))])
            except (UnicodeEncodeError, OSError) as error:
                raise InvalidRequest("path", f"cannot go to another process: {error}") from error

        ticket = InFlight(self._lifecycle.new_id(action))
        answer = await self._ask(ticket, frame)
        assert isinstance(answer, int)
        return answer

    def _file_there(self, path: Path) -> str:
        """What a file is called where the engine is."""
        return str(path.absolute())

    async def _ask(
        self,
        ticket: InFlight,
        frame: Callable[[int], bytes],
        emit: Emit | None = None,
        on_progress: ProgressCallback | None = None,
        on_call: Callable[[Call], None] | None = None,
    ) -> Answer:
        """Ask something, and wait for its answer."""
        self._lifecycle.check_running()
        connection = self._connection
        assert connection is not None
        call: Call

        def cancel() -> None:
            connection.calls.ask_to_cancel(call)

        def over(ended: PendingWork[Any]) -> None:
            if isinstance(ended.error, EngineStopped) and ended.aborted_with is None:
                ticket.aborted = True  # the other end was quicker with it
            self._lifecycle.in_flight.remove(ticket)

        def abort(error: MLXEngineError) -> bool:
            connection.end_by(time.monotonic())  # or what is stuck would stay
            return connection.calls.abort(call, error)

        call = Call(frame, cancel, over, emit, in_this_loop(on_progress))
        if on_call is not None:
            on_call(call)
        ticket.abort = abort
        self._lifecycle.admit(ticket)
        return await connection.calls.run(call)  # type: ignore[no-any-return]


_STOPPED_LOADING = "the engine was stopped while it was loading"
_NOTHING_YET = EngineStats(
    "created", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, PromptCacheStats()
)


def _drain(lifecycle: Lifecycle, connection: Connection) -> None:
    """Somebody else has asked its process to end: it drains, here too. In the I/O loop."""
    task = asyncio.ensure_future(lifecycle.shutdown(None, connection.closed))
    _draining.add(task)
    task.add_done_callback(_draining.discard)


_draining: set[asyncio.Task[ShutdownReport]] = set()


def _end(lifecycle: Lifecycle, exit: Exit) -> None:
    """What ran it is gone."""
    lifecycle.fail(exit.error)


def _abandoned(connection: Connection) -> None:
    """Its engine became garbage: nobody will ever stop it."""
    if connection.exit is not None:
        return
    try:
        connection.kill()
    except RuntimeError:
        return  # in a process that was forked from the engine's own: it is not ours
    warnings.warn(
        "an engine was dropped without being stopped; use 'async with', or await stop()",
        ResourceWarning,
        stacklevel=2,
    )
