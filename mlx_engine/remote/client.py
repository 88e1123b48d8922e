"""The client's side of an engine elsewhere: its life, its connection, and what is asked over it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.drain import clean_up, finish, is_destroyed
from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle, checked_timeout
from mlx_engine.core.stream import Emit
from mlx_engine.core.wakeup import running_loop
from mlx_engine.core.work import PendingWork
from mlx_engine.errors import EngineDead, EngineNotRunning, EngineStopped, MLXEngineError
from mlx_engine.outputs import EngineState, ProgressCallback, ShutdownReport
from mlx_engine.remote.calls import Call
from mlx_engine.remote.connection import Connection
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.part import Part
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.remote.wire.messages import Welcome

_STOPPED_LOADING = "the engine was stopped while it was loading"


class Client:
    """A client of an engine elsewhere: each of its lives is a connection.

    The engine and its requests hold it; once nobody does, what runs the engine is killed.

    Args:
        name: of the engine, for the log.
        watchdog: of each connection.
        frame_limit: bytes that a request may take.

    Attributes:
        frame_limit: the same.
        lifecycle: the engine's state, and what is in flight.
        connection: the latest one; ``None`` before the first start.
    """

    def __init__(self, name: str, watchdog: Watchdog | None, frame_limit: int) -> None:
        self.frame_limit = frame_limit
        self.lifecycle = Lifecycle(name)
        self.connection: Connection | None = None
        self._name = name
        self._watchdog = watchdog
        self._numbers = itertools.count(1)
        self._finalizer: weakref.finalize[[Connection], Client] | None = None
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Drop the connection in a fork of this process: the parent process has the engine."""
        if self.connection is not None and self.connection.exit is None:
            self.connection = None

    @property
    def welcome(self) -> Welcome | None:
        """The engine's words on itself, as long as it is there. From any thread."""
        connection = self.connection
        return None if connection is None or connection.exit is not None else connection.welcome

    async def start(
        self,
        make_link: Callable[[], Link],
        greeting: Callable[[int | None], bytes],
        on_progress: ProgressCallback | None,
        part: Part | None = None,
    ) -> None:
        """Open a connection, and wait until the engine at its other end is ready.

        Args:
            make_link, greeting: as for ``Connection``.
            on_progress: told of the load, in the running event loop.
            part: what the engine may have of this process's memory.

        Cancellation and errors: see ``LinkedEngine.start``.
        """
        io_thread.check_fork()
        lifecycle = self.lifecycle
        entry = InFlight(lifecycle.new_id("start"), loop=running_loop())
        connection = Connection(
            self._name,
            make_link,
            greeting,
            self._watchdog,
            in_this_loop(on_progress),
            functools.partial(_drain, lifecycle),
            functools.partial(_end, lifecycle),
            part,
        )

        def abort(_: MLXEngineError) -> bool:
            connection.end_by(time.monotonic())
            return True

        entry.abort = abort
        if not await lifecycle.begin_start(entry):
            return
        try:
            self.connection = connection
            if part is not None:
                await part.take()
            await io_thread.run(connection.open)
            if connection.exit is not None:
                raise connection.exit.error()
            if not lifecycle.start_succeeded(entry):
                raise EngineStopped(_STOPPED_LOADING)
            if connection.exit is not None:  # in the last moment: it has been running
                _end(lifecycle, connection.exit)
            self._finalizer = weakref.finalize(self, _abandoned, connection)
            self._finalizer.atexit = False
        except BaseException as error:
            if part is not None and connection.link is None:
                part.close()
            if isinstance(error, EngineDead):  # for want of a thread or a file, say
                error.phase = error.phase or connection.liveness.heartbeat.phase
            if is_destroyed(error):
                connection.kill()
            await clean_up(error, functools.partial(self._release, connection, patience=0.0))
            if lifecycle.state is EngineState.DRAINING and isinstance(error, EngineNotRunning):
                raise EngineStopped(_STOPPED_LOADING) from None
            raise
        finally:
            lifecycle.start_failed(entry)
            lifecycle.in_flight.remove(entry)

    async def shutdown(self, timeout: float | None) -> ShutdownReport:
        """Drain, end what runs the engine, and close the connection: ``LinkedEngine.shutdown``."""
        timeout = checked_timeout(timeout)
        running_loop()
        connection = self.connection
        if connection is not None:
            connection.end_by(None if timeout is None else time.monotonic() + timeout)
        return await self.lifecycle.shutdown(timeout, functools.partial(self._release, connection))

    async def clear_failure(self) -> None:
        """Be stopped, if the engine has failed, so that it can be started again."""
        release = functools.partial(self._release, self.connection, 0.0)
        await self.lifecycle.clear_failure(release)

    def new_number(self) -> int:
        """A number for a call that no other one of this client has."""
        return next(self._numbers)

    def ask(
        self,
        entry: InFlight,
        number: int,
        frame: bytes,
        emit: Emit | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Call:
        """A call in flight, whose ``answer()`` is to be awaited at once.

        Args:
            entry: for what is asked.
            number: of the call, in ``frame`` too.
            frame: the payload that asks.
            emit: gets chunks, on the I/O thread.
            on_progress: told of progress, in the running event loop.

        Raises:
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state.
        """
        lifecycle, connection = self.lifecycle, self.connection
        lifecycle.check_running()
        assert connection is not None

        def over(ended: PendingWork[Any]) -> None:
            if isinstance(ended.error, EngineStopped) and ended.aborted_with is None:
                entry.aborted = True  # the other end was quicker with it
            lifecycle.in_flight.remove(entry)

        def abort(error: MLXEngineError) -> bool:
            connection.end_by(time.monotonic())  # or what is stuck would stay
            return connection.calls.abort(call, error)

        call = Call(
            connection.calls,
            number,
            frame,
            over,
            emit,
            in_this_loop(on_progress),
            counted=entry.reported,
        )
        entry.abort = abort
        lifecycle.admit(entry)
        return call

    async def _release(self, connection: Connection | None, patience: float | None = None) -> None:
        """Wait until what runs the engine is gone; not to be cut short."""
        if self._finalizer is not None:
            self._finalizer.detach()
        if connection is None or connection.link is None or connection.exit is not None:
            return
        closed = functools.partial(connection.closed, patience)
        await finish(lambda: io_thread.run(closed))


def _drain(lifecycle: Lifecycle, connection: Connection) -> None:
    """Drain here too: somebody else has asked the engine's process to end. In the I/O loop."""
    task = asyncio.ensure_future(lifecycle.shutdown(None, connection.closed))
    _draining.add(task)
    task.add_done_callback(_draining.discard)


_draining: set[asyncio.Task[ShutdownReport]] = set()


def _end(lifecycle: Lifecycle, exit: Exit) -> None:
    """Make the engine FAILED: what ran it is gone."""
    lifecycle.fail(exit.error)


def _abandoned(connection: Connection) -> None:
    """Kill what runs an engine that became garbage: nobody will ever stop it."""
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
