"""The I/O thread: one event loop, on a thread of its own, for all engines that are elsewhere.

Applications' loops come and go, and may be busy; this one is there as long as the process, so
that an engine can be used from any of them, and its end is noticed whatever they do. It is
asyncio's own loop, whichever one the application runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import selectors
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mlx_engine.core.drain import wait_shielded
from mlx_engine.core.forks import NO_FORK, tell_after_fork
from mlx_engine.core.threads import Start, dead
from mlx_engine.core.work import PendingWork
from mlx_engine.errors import EngineDead

T = TypeVar("T")

_EXIT = "the interpreter is shutting down"

_LOOK = 1.0  # seconds after which to look whether an event loop was closed meanwhile
_LAST = 0.5  # seconds for what goes on to end when the interpreter exits


class _Job(PendingWork[T]):
    """A coroutine function that somebody waits for; a task, once it has begun."""

    def __init__(
        self, func: Callable[[], Coroutine[Any, Any, T]], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__()
        self.func = func
        self.loop = loop  # of the I/O thread
        self.task: asyncio.Task[T] | None = None


class IOThread:
    """An event loop on a daemon thread, started when it is first needed.

    If that cannot be done, whoever needed it is told so, and the next one tries again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may be where this is
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._start: Start | None = None
        self._jobs: set[_Job[Any]] = set()  # that are not over
        self._at_exit: set[weakref.WeakMethod[Callable[[], None]]] = set()
        tell_after_fork(self)

    def call(self, func: Callable[..., object], *args: object) -> None:
        """Call ``func`` in the loop, soon. From any thread; nothing happens at exit, nor when
        there is no loop and none can be had.

        Raises:
            RuntimeError: this process was forked from one that uses engines elsewhere.
        """
        with contextlib.suppress(EngineDead):
            _call_in(self._running_loop(), func, *args)

    async def run(self, func: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in the loop, and wait for it in the caller's.

        Cancellation: the coroutine is cancelled; the first ``CancelledError`` is raised when it
        has ended, however often the caller is cancelled meanwhile.

        Raises:
            RuntimeError: this process was forked from one that uses engines elsewhere.
            EngineDead: the thread cannot be started, or the interpreter is shutting down.
            BaseException: whatever the coroutine raises.
        """
        job, start = self._enter(func)
        limit = start.limit() if start is not None and start.pending else None
        cancel = functools.partial(self._cancel, job)
        try:
            await wait_shielded(job.out, cancel)
        finally:
            if limit is not None:
                limit.cancel()
            if not job.out.done():  # the coroutine is being destroyed, its loop is gone
                cancel()
        return job.outcome()

    def check_fork(self) -> None:
        """Raise ``RuntimeError`` in a process forked from one that uses engines elsewhere."""
        if self._loop is not None and self._pid != os.getpid():
            raise RuntimeError(
                f"an engine elsewhere was used before this process was forked, and {NO_FORK}"
            )

    def call_at_exit(self, method: Callable[[], None]) -> None:
        """Call a bound method, in the loop, when the interpreter exits, if its object is there."""
        self._at_exit.add(weakref.WeakMethod(method, self._at_exit.discard))

    def after_fork(self) -> None:
        """Replace the lock in a fork of this process: the thread that may have it is not there."""
        self._lock = threading.RLock()

    # What is to be done in the loop

    def _enter(self, func: Callable[[], Coroutine[Any, Any, T]]) -> tuple[_Job[T], Start | None]:
        with self._lock:
            loop = self._running_loop()
            if loop.is_closed():
                raise EngineDead(_EXIT)
            job = _Job(func, loop)
            self._jobs.add(job)  # before the loop ends: then it is told
            _call_in(loop, self._begin, job)
            return job, self._start

    def _begin(self, job: _Job[Any]) -> None:
        with self._lock:
            if job not in self._jobs:
                return  # it was cancelled on its way here
            job.task = job.loop.create_task(job.func())
        job.task.add_done_callback(functools.partial(self._ended, job))
        job.loop.call_later(_LOOK, self._look, job)

    def _look(self, job: _Job[Any]) -> None:
        """Cancel a job that nobody waits for: a loop that is closed cancels nothing."""
        assert job.task is not None
        if job.orphaned:
            job.task.cancel()
        elif not job.task.done():
            job.loop.call_later(_LOOK, self._look, job)

    def _ended(self, job: _Job[Any], task: asyncio.Task[Any]) -> None:
        if task.cancelled():  # by the caller, who then is told so, or at exit
            self._over(job, EngineDead(_EXIT))
        elif (error := task.exception()) is not None:
            self._over(job, error)
        else:
            job.value = task.result()
            self._over(job)

    def _cancel(self, job: _Job[Any]) -> None:
        """Cancel a job. From any thread."""
        with self._lock:
            task = job.task
        if task is None:
            self._over(job)
        else:
            _call_in(job.loop, task.cancel)

    def _over(self, job: _Job[Any], error: BaseException | None = None) -> None:
        """Tell whoever waits, once. From any thread."""
        with self._lock:
            if job not in self._jobs:
                return
            self._jobs.discard(job)
        job.error = error
        job.announce()

    # The loop

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is None:
            with self._lock:
                loop = self._loop or self._new_loop()
        self.check_fork()
        return loop

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        """A loop that will run; what is called in it until then waits for that."""
        try:
            _check_descriptors()
            loop = asyncio.SelectorEventLoop()
        except OSError as error:
            raise dead("the I/O thread cannot be started", error) from error
        start = Start(
            functools.partial(self._main, loop),
            "mlx-engine io",
            functools.partial(self._not_started, loop),
        )
        try:
            start.begin()
        except EngineDead:
            loop.close()
            raise
        self._loop, self._pid, self._start = loop, os.getpid(), start
        return loop

    def _not_started(self, loop: asyncio.AbstractEventLoop, error: EngineDead) -> None:
        """Forget ``loop``, for which there is no thread: it is as if nobody had asked for one."""
        with self._lock:
            self._loop = self._start = None
            jobs = [job for job in self._jobs if job.loop is loop]
        loop.close()
        for job in jobs:
            self._over(job, EngineDead(error.reason))  # an error of its own for each

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        atexit.register(self._close, loop, threading.current_thread())
        while not _ran(loop):
            pass

    def _close(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """End the loop at exit, so that nothing runs while the interpreter is torn down."""
        if self._pid != os.getpid() or loop.is_closed():
            return
        if thread.is_alive():
            ending = asyncio.run_coroutine_threadsafe(self._end_all(), loop)
            with contextlib.suppress(TimeoutError):
                ending.result(2 * _LAST)
            _call_in(loop, loop.stop)
            thread.join(_LAST)
        with self._lock:
            if not thread.is_alive():
                loop.close()
            jobs = list(self._jobs)
        for job in jobs:  # that came after all others had been told, or are stuck
            self._over(job, EngineDead(_EXIT))

    async def _end_all(self) -> None:
        """Tell everybody that there will be no more, and let what goes on end."""
        for reference in list(self._at_exit):
            if (method := reference()) is not None:
                method()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST)


def _call_in(loop: asyncio.AbstractEventLoop, func: Callable[..., object], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(func, *args)
    except RuntimeError:
        pass  # it was closed: the interpreter is shutting down


def _ran(loop: asyncio.AbstractEventLoop) -> bool:
    """Run a loop until it is stopped; ``False`` if memory was too short for a turn of it."""
    try:
        loop.run_forever()
    except MemoryError:
        return False  # the callbacks that are left wait for the next turn
    return True


def _check_descriptors() -> None:
    """Raise ``OSError`` unless a loop can have the three that it needs.

    A loop that could be made in part would complain when it is dropped.
    """
    selector = selectors.DefaultSelector()
    try:
        for end in socket.socketpair():
            end.close()
    finally:
        selector.close()


io_thread = IOThread()
