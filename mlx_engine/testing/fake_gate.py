"""A place in a script where a test holds the work."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from mlx_engine.core.wakeup import Broadcast
from mlx_engine.outputs import EngineState, EngineStats
from mlx_engine.testing.script_error import ScriptError, mistake

_LOOK = 0.05  # seconds between two looks whether anybody can still come
_ENDED = 1.0  # seconds after its end in which an engine may be started again
_QUIET = 60.0  # seconds in which somebody may come from another thread, or another process

_FIRST = asyncio.FIRST_COMPLETED
_AT_WORK = (EngineState.STARTING, EngineState.RUNNING, EngineState.DRAINING)


class Gate:
    """Stands among the pieces of a ``FakeAnswer``, or of a load, and holds the work there.

        gate = Gate()
        async with FakeEngine(["Once", gate, " upon"]) as engine:
            task = asyncio.create_task(engine.generate("Tell me a story"))
            await gate.reached(by=task)  # one token has been made, no other is on its way
            task.cancel()

    A gate is closed until it is opened, and stays open. A request that is cancelled, or whose
    engine is stopped, ends there at once. Use it with any number of requests, from any thread.

    Args:
        firm: hold those as well that are cancelled, like a step of a real model that takes
            long: their callers stay until the gate is opened.
    """

    def __init__(self, *, firm: bool = False) -> None:
        self._firm = firm
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._arrived = 0
        self._changed = Broadcast()

    @property
    def is_open(self) -> bool:
        """Whether it lets everyone pass."""
        return self._open.is_set()

    def open(self) -> None:
        """Let everyone pass, now and later. From any thread."""
        self._open.set()

    async def reached(self, times: int = 1, *, by: asyncio.Future[Any] | None = None) -> None:
        """Wait until the work has come to it so many times, all requests together.

        Args:
            by: the task that is to bring it there: the wait ends with it.

        Raises:
            TypeError: ``by`` is no task.
            ScriptError: nobody will come any more: ``by`` is over, the engines have ended, a script
                has a mistake, or no task is left in this event loop that could ask, and one has
                failed, or nothing has happened for a minute.
        """
        if by is not None and not isinstance(by, asyncio.Future):
            raise TypeError(f"by is the task that is to come there, not {by!r}")
        watch: _Watch | None = None
        try:
            while True:
                with self._lock:
                    if self._arrived >= times:
                        return
                    changed = self._changed.watch()
                watch = watch or _Watch(by)
                try:
                    await asyncio.wait({changed, by or changed}, timeout=_LOOK, return_when=_FIRST)
                finally:
                    self._changed.forget(changed)
                if self._arrived < times and (problem := watch.problem()) is not None:
                    raise problem
        finally:
            if watch is not None:
                watch.close()

    def arrive(self) -> None:
        """The work has come to it. On the engine's thread."""
        with self._lock:
            self._arrived += 1
            self._changed.notify()

    def holds(self, stopping: bool) -> bool:
        """Whether work stays at it that should stop, or should not. On the engine's thread."""
        return not self._open.is_set() and (self._firm or not stopping)


class Watched(Protocol):
    """An engine, as far as it may have work that comes to a gate."""

    @property
    def state(self) -> EngineState:
        """Where it is in its life."""

    @property
    def mistakes(self) -> Sequence[ScriptError]:
        """Mistakes of its script that have come up."""

    def stats(self) -> EngineStats:
        """Its counters."""


engines: weakref.WeakSet[Watched] = weakref.WeakSet()  # all that there are


class _Watch:
    """A look, again and again, at who could still come to a gate.

    Args:
        by: the task that is to come to it, if that is known.
    """

    def __init__(self, by: asyncio.Future[Any] | None) -> None:
        self._by = by
        self._me = asyncio.current_task()
        _waiting.add(self._me)
        self._tasks = _others()
        self._engines = _at_work()  # and those that have been since
        self._ended = self._quiet = time.monotonic()  # since when all have ended, or do nothing

    def close(self) -> None:
        """Nobody waits any more."""
        _waiting.discard(self._me)

    def problem(self) -> ScriptError | None:
        """The reason why nobody will come; ``None`` if somebody may."""
        self._engines |= _at_work()
        for error in (error for one in self._engines for error in one.mistakes):
            return mistake(f"nobody comes to the gate: {error}", error)
        if self._by is not None and self._by.done():
            return _over("the task that was to come to the gate is over", [self._by])
        return self._all_ended() or self._none_left()

    def _all_ended(self) -> ScriptError | None:
        now, states = time.monotonic(), {one.state for one in self._engines}
        if not states or not states.isdisjoint(_AT_WORK):
            self._ended = now
        if now - self._ended <= _ENDED:
            return None
        return mistake(f"nobody comes to the gate: the engine is {', '.join(sorted(states))}")

    def _none_left(self) -> ScriptError | None:
        now, left, counts = time.monotonic(), _others(), [one.stats() for one in self._engines]
        self._tasks |= left
        if left or any(one.running or one.waiting for one in counts):
            self._quiet = now
        elif failed := [task for task in self._tasks if _has_failed(task)]:
            return _over("nobody is left who could come to the gate", failed)
        if now - self._quiet <= _QUIET:
            return None
        return mistake("nobody has come to the gate, or asked an engine, for a minute")


_waiting: set[asyncio.Task[Any] | None] = set()  # tasks that wait at gates


def _at_work() -> set[Watched]:
    return {one for one in list(engines) if one.state in _AT_WORK}


def _others() -> set[asyncio.Future[Any]]:
    """Tasks of this event loop that are not over, and do not wait at gates themselves, or for the
    end of the test, as that of anyio's plugin for pytest does.
    """
    return {
        task
        for task in asyncio.all_tasks()
        if task not in _waiting
        and not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")
    }


def _has_failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _over(problem: str, tasks: Sequence[asyncio.Future[Any]]) -> ScriptError:
    for task in filter(_has_failed, tasks):
        error = task.exception()
        return mistake(f"{problem}: {error!r}", error)
    return mistake(problem)
