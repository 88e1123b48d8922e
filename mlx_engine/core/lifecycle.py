"""The states of an engine, and how it is started and shut down."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

from mlx_engine.checks import number_or_none
from mlx_engine.core.drain import clean_up, finish
from mlx_engine.core.forks import NO_FORK, tell_after_fork
from mlx_engine.core.in_flight import InFlight, InFlightRegistry
from mlx_engine.core.log import LOG
from mlx_engine.core.wakeup import running_loop
from mlx_engine.errors import EngineDead, EngineNotStarted, EngineStopped, MLXEngineError
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

_RECHECK = 1.0  # seconds after which to look whether an event loop was closed meanwhile


class Lifecycle:
    """The state of one engine. Every method may be called from any thread.

    Attributes:
        name: of the engine, for the log.
        in_flight: what is in flight in it.
    """

    def __init__(self, name: str = "engine") -> None:
        self.name = name
        self.in_flight = InFlightRegistry()
        self._began = 0.0  # to start, by time.monotonic
        self._state = EngineState.CREATED
        self._draining: list[InFlight] = []
        self._starter: InFlight | None = None
        self._releasing: asyncio.AbstractEventLoop | None = None  # in which that is done
        self._reviving = False  # a failed engine is stopped to be started again
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
        self.in_flight.after_fork()
        self._draining = []
        self._starter = self._releasing = None
        if self._state not in (EngineState.CREATED, EngineState.STOPPED):
            self._inherited, self._state = True, EngineState.FAILED
            self._failure = _forked

    @property
    def _lock(self) -> threading.RLock:
        return self.in_flight.lock

    def new_id(self, prefix: str = "req") -> str:
        """A name that no other request of this engine has."""
        return self.in_flight.new_id(prefix)

    def move(self, to: EngineState) -> None:
        """Change the state.

        Raises:
            RuntimeError: there is no such transition; a bug of the engine's.
        """
        with self._lock:
            if to not in _TRANSITIONS[self._state]:
                raise RuntimeError(f"an engine cannot go from {self._state} to {to}")
            self._state = to
            self.in_flight.changed.notify()

    def fail(self, failure: str | Callable[[], EngineDead]) -> None:
        """Be FAILED, unless the engine is being shut down, which then goes on.

        Args:
            failure: what new requests are told, or what makes the error that they get.
        """
        with self._lock:
            self._failure = partial(EngineDead, failure) if isinstance(failure, str) else failure
            failed = self._state is EngineState.RUNNING
            if failed:
                self.move(EngineState.FAILED)
        if failed and LOG.isEnabledFor(logging.INFO):
            LOG.info("%s has failed: %s", self.name, self._failure())

    async def failed(self) -> Exception:
        """Wait until it is FAILED; gives the error that tells why."""
        while True:
            with self._lock:
                if self._state is EngineState.FAILED:
                    return self._failure()
                changed = self.in_flight.changed.watch()
            await self.in_flight.changed.wait(changed)

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
                again = "start() it again" if self._state is EngineState.STOPPED else "it ends"
                raise EngineStopped(f"the engine is {self._state}: no new requests; {again}")
            case EngineState.FAILED:
                raise self._failure()
            case EngineState.RUNNING:
                return

    def admit(self, entry: InFlight) -> None:
        """``check_running``, and put it in flight, in one step."""
        with self._lock:
            self.check_running()
            self.in_flight.add(entry)

    async def begin_start(self, entry: InFlight) -> bool:
        """Enter STARTING, with ``entry`` in flight; ``False`` if the engine runs by now.

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
                        self.in_flight.remove(self._starter)
                        self.move(EngineState.CREATED)
                        waited = False
                        continue
                    changed = self.in_flight.changed.watch()
                elif waited:
                    raise EngineNotStarted("the start that another task had begun did not succeed")
                elif self._state in (EngineState.CREATED, EngineState.STOPPED):
                    self.move(EngineState.STARTING)
                    self._starter, self._began = entry, time.monotonic()
                    self.in_flight.add(entry)
                    return True
                else:
                    self.check_running()
            await self.in_flight.changed.wait(changed, _RECHECK)
            waited = True

    def is_starter(self, entry: InFlight) -> bool:
        """Whether no other start has begun since; one does when this one's event loop is closed."""
        return self._starter is entry

    def start_succeeded(self, entry: InFlight) -> bool:
        """Be RUNNING; ``False`` if a shutdown, or another start, has begun meanwhile."""
        with self._lock:
            if self._state is not EngineState.STARTING or not self.is_starter(entry):
                return False
            self.move(EngineState.RUNNING)
            self._reviving = False
        LOG.info("%s has started, in %.1f s", self.name, time.monotonic() - self._began)
        return True

    def start_failed(self, entry: InFlight) -> None:
        """Leave STARTING without success; what has begun meanwhile goes on."""
        with self._lock:
            if self._state is EngineState.STARTING and self.is_starter(entry):
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
            self._reviving = False  # whoever wants it started again finds it stopped
            over = self._begin_draining()
        return self._report if over else await self._drain(timeout, release)

    async def clear_failure(self, release: Callable[[], Awaitable[None]]) -> None:
        """Stop a FAILED engine, so that it can be started again; any other is left alone.

        Several tasks may do so at once, and all of them wait. What is still in flight gets the
        error with which the engine has failed.

        Raises:
            EngineStopped: it is stopped, or being stopped, by somebody who wants it so.
            RuntimeError: this process is a fork of the one in which it was started.
        """
        running_loop()
        with self._lock:
            if self._inherited:
                raise self._failure()
            if self._state in (EngineState.DRAINING, EngineState.STOPPED) and not self._reviving:
                self.check_running()
            if self._state in (EngineState.CREATED, EngineState.STARTING, EngineState.RUNNING):
                return
            self._reviving = True
            over = self._begin_draining()
        if not over:
            await self._drain(0.0, release)
        with self._lock:
            if self._state is EngineState.STOPPED and not self._reviving:
                self.check_running()

    def _begin_draining(self) -> bool:
        """Be DRAINING; whether it is STOPPED already. Under the lock."""
        if self._inherited:  # there is nothing here to stop
            self._state = EngineState.STOPPED
            self._report = ShutdownReport()
        if self._state is EngineState.STOPPED:
            return True
        if self._state is not EngineState.DRAINING:
            loading = self._state is EngineState.STARTING
            self.move(EngineState.DRAINING)
            self._draining = [one for one in self.in_flight if one.abortable]
            if loading:  # nobody wants the model any more
                self._abort_all()
        return False

    async def _drain(
        self, timeout: float | None, release: Callable[[], Awaitable[None]]
    ) -> ShutdownReport:
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
                changed = self.in_flight.changed.watch()
            await self.in_flight.changed.wait(changed, _RECHECK)

    def _released(self, loop: asyncio.AbstractEventLoop) -> None:
        """Be STOPPED, unless somebody in another loop has taken over from ``loop``."""
        with self._lock:
            if self._releasing is not loop:
                return
            self._releasing = None
            told = [one for one in self._draining if one.reported]
            self._report = ShutdownReport(
                finished=tuple(one.request_id for one in told if not one.aborted),
                aborted=tuple(one.request_id for one in told if one.aborted),
            )
            self._draining = []
            self.move(EngineState.STOPPED)
            ended = len(self._report.finished), len(self._report.aborted)
        LOG.info(
            "%s has stopped; of those in flight then %d finished, %d aborted", self.name, *ended
        )

    def _abort_all(self) -> None:
        """Abort what was in flight when the draining began; the release is not."""
        with self._lock:
            left = [one for one in self._draining if one in self.in_flight]
        for one in left:
            if not one.aborted and one.abort is not None:
                one.aborted = one.abort(self._why_aborted())

    def _why_aborted(self) -> MLXEngineError:
        failure = self._failure() if self._reviving else None
        if isinstance(failure, MLXEngineError):
            return failure
        return EngineStopped("the engine was stopped while this was in flight")

    async def _idle(self, timeout: float | None) -> None:
        """Wait until none of the work to drain is in flight, for ``timeout`` seconds at most."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if not any(one in self.in_flight and not one.orphaned for one in self._draining):
                    return
                changed = self.in_flight.changed.watch()
            left = _RECHECK if deadline is None else min(_RECHECK, deadline - time.monotonic())
            if left <= 0:
                return
            await self.in_flight.changed.wait(changed, left)


def checked_timeout(timeout: float | None) -> float | None:
    """``timeout``, if it can be one; raises ``InvalidRequest`` if not."""
    return number_or_none("timeout", timeout, low=0, endless=True, what="seconds")


def _forked() -> RuntimeError:
    return RuntimeError(f"the engine was started before this process was forked, and {NO_FORK}")


def _unknown() -> EngineDead:
    return EngineDead("the engine has failed; await engine.restart()")
