"""The states of an engine, what is in flight in it, and how it is shut down."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from mlx_engine.checks import number_or_none
from mlx_engine.core.drain import clean_up, finish
from mlx_engine.core.event_loop import running_loop
from mlx_engine.core.forks import NO_FORK, tell_after_fork
from mlx_engine.core.wakeup import wake
from mlx_engine.errors import (
    EngineDead,
    EngineNotStarted,
    EngineStopped,
    MLXEngineError,
)
from mlx_engine.outputs import EngineState, ShutdownReport

_S = EngineState
_TRANSITIONS: dict[EngineState, frozenset[EngineState]] = {
    _S.CREATED: frozenset({_S.STARTING, _S.DRAINING}),
    _S.STARTING: frozenset({_S.RUNNING, _S.CREATED, _S.DRAINING, _S.FAILED}),
    _S.RUNNING: frozenset({_S.DRAINING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.STOPPED: frozenset({_S.STARTING}),
    _S.FAILED: frozenset({_S.DRAINING}),
}

Abort = Callable[[MLXEngineError], bool]

_RECHECK = 1.0  # seconds after which to look whether an event loop was closed meanwhile


class Ticket:
    """Something in flight: a request, a user's function, or the engine's own work.

    Args:
        request_id: its name.
        loop: the event loop without which it would never end; ``None`` if the MLX thread
            ends it.
        abortable: whether a shutdown may abort it; else it does not wait for it either.
        reported: whether a shutdown reports on it: it is a request, whose name its caller knows.
    """

    def __init__(
        self,
        request_id: str,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        abortable: bool = True,
        reported: bool = True,
    ) -> None:
        self.request_id = request_id
        self.abortable = abortable
        self.reported = reported
        self.abort: Abort | None = None
        self.aborted = False
        self._loop = loop

    @property
    def orphaned(self) -> bool:
        """Whether nobody will ever end it."""
        return self._loop is not None and self._loop.is_closed()


class Lifecycle:
    """State and in-flight work of one engine. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._state = EngineState.CREATED
        self._in_flight: dict[str, Ticket] = {}
        self._watchers: list[asyncio.Future[None]] = []
        self._ids: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self._draining: list[Ticket] = []
        self._starter: Ticket | None = None
        self._releasing: asyncio.AbstractEventLoop | None = None  # in which that is done
        self._report = ShutdownReport()
        self._failure: Callable[[], Exception] = _unknown
        self._inherited = False
        tell_after_fork(self)

    @property
    def state(self) -> EngineState:
        """The present state."""
        return self._state

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one in which the engine was started."""
        return self._inherited

    def after_fork(self) -> None:
        """In a fork of this process: what ran the engine is not there, nor what was in flight."""
        self._lock = threading.RLock()  # somebody may have held it
        self._in_flight, self._draining, self._watchers = {}, [], []
        self._starter = self._releasing = None
        if self._state not in (EngineState.CREATED, EngineState.STOPPED):
            self._inherited, self._state = True, EngineState.FAILED
            self._failure = _forked

    def new_id(self, prefix: str = "req") -> str:
        """A name that no other request of this engine has."""
        with self._lock:
            return f"{prefix}-{next(self._ids[prefix])}"

    def move(self, to: EngineState) -> None:
        """Change the state.

        Raises:
            RuntimeError: there is no such transition; a bug of the engine's.
        """
        with self._lock:
            if to not in _TRANSITIONS[self._state]:
                raise RuntimeError(f"an engine cannot go from {self._state} to {to}")
            self._state = to
            self._notify()

    def fail(self, failure: str | Callable[[], EngineDead]) -> None:
        """Be FAILED, unless the engine is being shut down, which then goes on.

        Args:
            failure: what new requests are told, or what makes the error that they get.
        """
        with self._lock:
            self._failure = partial(EngineDead, failure) if isinstance(failure, str) else failure
            if self._state is EngineState.RUNNING:
                self.move(EngineState.FAILED)

    async def failed(self) -> Exception:
        """Wait until it is FAILED; gives the error that tells why."""
        while True:
            with self._lock:
                if self._state is EngineState.FAILED:
                    return self._failure()
                changed = self._watch()
            await self._wait(changed)

    def check_running(self) -> None:
        """Raise the error that tells why requests are refused, unless they are taken.

        Raises:
            EngineNotStarted, EngineStopped, EngineDead: by the state.
            RuntimeError: this process is a fork of the one in which the engine was started.
        """
        match self._state:
            case EngineState.CREATED:
                raise EngineNotStarted("the engine has not been started: await start() first")
            case EngineState.STARTING:
                raise EngineNotStarted("the engine is still loading its model: await start()")
            case EngineState.DRAINING | EngineState.STOPPED:
                raise EngineStopped(f"the engine is {self._state}: no new requests")
            case EngineState.FAILED:
                raise self._failure()
            case EngineState.RUNNING:
                return

    def add(self, ticket: Ticket, abort: Abort) -> None:
        """Put a ticket in flight; ``abort(error)`` must end it promptly, and tell if it did."""
        with self._lock:
            ticket.abort = abort
            self._in_flight[ticket.request_id] = ticket

    def admit(self, ticket: Ticket, abort: Abort) -> None:
        """``check_running`` and ``add`` in one step."""
        with self._lock:
            self.check_running()
            self.add(ticket, abort)

    def done(self, ticket: Ticket) -> None:
        """The ticket's work is out of MLX."""
        with self._lock:
            self._in_flight.pop(ticket.request_id, None)
            self._notify()

    async def begin_start(self, ticket: Ticket, abort: Abort) -> bool:
        """Enter STARTING, with ``ticket`` in flight; ``False`` if the engine runs by now.

        Raises:
            EngineStopped: it is being shut down.
            EngineDead: it has failed.
            EngineNotStarted: another task was starting it, and did not succeed.
        """
        waited = False
        while True:
            with self._lock:
                if self._state is EngineState.RUNNING:
                    return False
                if self._state is EngineState.STARTING:
                    if self._starter is not None and self._starter.orphaned:
                        self._in_flight.pop(self._starter.request_id, None)
                        self.move(EngineState.CREATED)
                        waited = False
                        continue
                    changed = self._watch()
                elif waited:
                    raise EngineNotStarted("the start that another task had begun did not succeed")
                elif self._state in (EngineState.CREATED, EngineState.STOPPED):
                    self.move(EngineState.STARTING)
                    self._starter = ticket
                    self.add(ticket, abort)
                    return True
                else:
                    self.check_running()
            await self._wait(changed, _RECHECK)
            waited = True

    def is_starter(self, ticket: Ticket) -> bool:
        """Whether no other start has begun since; one does when this one's event loop is closed."""
        return self._starter is ticket

    def start_succeeded(self, ticket: Ticket) -> bool:
        """Be RUNNING; ``False`` if a shutdown, or another start, has begun meanwhile."""
        with self._lock:
            if self._state is EngineState.STARTING and self.is_starter(ticket):
                self.move(EngineState.RUNNING)
                return True
            return False

    def start_failed(self, ticket: Ticket) -> None:
        """Leave STARTING without success; what has begun meanwhile goes on."""
        with self._lock:
            if self._state is EngineState.STARTING and self.is_starter(ticket):
                self.move(EngineState.CREATED)

    async def shutdown(
        self, timeout: float | None, release: Callable[[], Awaitable[None]]
    ) -> ShutdownReport:
        """Drain, abort the rest, ``release``, and be STOPPED.

        Args:
            timeout: seconds that work in flight may go on; ``None`` is for ever.
            release: frees what the engine holds; called when nothing is in flight, and again
                if the event loop ends before it is done.
        """
        timeout = checked_timeout(timeout)
        running_loop()
        with self._lock:
            if self._inherited:  # there is nothing here to stop
                self._state = EngineState.STOPPED
                self._report = ShutdownReport()
            if self._state is EngineState.STOPPED:
                return self._report
            if self._state is not EngineState.DRAINING:
                loading = self._state is EngineState.STARTING
                self.move(EngineState.DRAINING)
                self._draining = [t for t in self._in_flight.values() if t.abortable]
                if loading:  # nobody wants the model any more
                    self._abort_all()
        end = partial(self._finish, release)
        try:
            await self._idle(timeout)
        except asyncio.CancelledError as cancelled:
            self._abort_all()
            await clean_up(cancelled, partial(finish, end))
            raise
        self._abort_all()
        return await finish(end)

    async def _finish(self, release: Callable[[], Awaitable[None]]) -> ShutdownReport:
        await self._idle(None)
        loop = running_loop()
        with self._lock:
            other = self._releasing  # unless it was closed meanwhile, and never will
            mine = self._state is EngineState.DRAINING and (other is None or other.is_closed())
            if mine:
                self._releasing = loop
        if mine:
            try:
                await release()
            finally:
                self._released(loop)
        while True:
            with self._lock:
                if self._state is not EngineState.DRAINING:
                    return self._report
                changed = self._watch()
            await self._wait(changed, _RECHECK)

    def _released(self, loop: asyncio.AbstractEventLoop) -> None:
        """It is STOPPED, unless somebody in another loop has taken over from ``loop``."""
        with self._lock:
            if self._releasing is not loop:
                return
            self._releasing = None
            told = [t for t in self._draining if t.reported]
            self._report = ShutdownReport(
                finished=tuple(t.request_id for t in told if not t.aborted),
                aborted=tuple(t.request_id for t in told if t.aborted),
            )
            self._draining = []
            self.move(EngineState.STOPPED)

    def _abort_all(self) -> None:
        """Abort what was in flight when the draining began; the release is not."""
        with self._lock:
            tickets = [t for t in self._draining if t.request_id in self._in_flight]
        for ticket in tickets:
            if not ticket.aborted and ticket.abort is not None:
                ticket.aborted = ticket.abort(
                    EngineStopped("the engine was stopped while this was in flight")
                )

    async def _idle(self, timeout: float | None) -> None:
        """Wait until none of the work to drain is in flight, for ``timeout`` seconds at most."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if not any(
                    t.request_id in self._in_flight and not t.orphaned for t in self._draining
                ):
                    return
                changed = self._watch()
            left = _RECHECK if deadline is None else min(_RECHECK, deadline - time.monotonic())
            if left <= 0:
                return
            await self._wait(changed, left)

    def _watch(self) -> asyncio.Future[None]:
        """A future of the running loop that is done at the next change. Under the lock."""
        future: asyncio.Future[None] = running_loop().create_future()
        self._watchers.append(future)
        return future

    async def _wait(self, future: asyncio.Future[None], timeout: float | None = None) -> None:
        try:
            await asyncio.wait({future}, timeout=timeout)
        finally:
            with self._lock:
                self._watchers = [watcher for watcher in self._watchers if watcher is not future]

    def _notify(self) -> None:
        """Wake whoever waits for a change. Under the lock."""
        watchers, self._watchers = self._watchers, []
        for future in watchers:
            wake(future)


def checked_timeout(timeout: float | None) -> float | None:
    """``timeout``, if it can be one; raises ``InvalidRequest`` if not."""
    return number_or_none("timeout", timeout, low=0, endless=True, what="seconds")


def _forked() -> RuntimeError:
    return RuntimeError(f"the engine was started before this process was forked, and {NO_FORK}")


def _unknown() -> EngineDead:
    return EngineDead("the engine has failed")
