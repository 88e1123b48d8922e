"""The I/O thread: one event loop, on a thread of its own, for all engines that are elsewhere.

Applications' loops come and go, and may be busy; this one is there as long as the process, so
that an engine can be used from any of them, and its end is noticed whatever they do. It is
asyncio's own loop, whichever one the application runs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from mlx_engine.errors import EngineDead
from mlx_engine.turn import Pending, outlast

T = TypeVar("T")

_EXIT = "the interpreter is shutting down"

_LOOK = 1.0  # seconds after which to look whether an event loop was closed meanwhile
_LAST = 0.5  # seconds for what goes on to end when the interpreter exits


class IOUser(Protocol):
    """What lives in the I/O loop."""

    def interpreter_exits(self) -> None:
        """The loop is about to end. In the loop."""


class IOThread:
    """An event loop on a daemon thread, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._users: weakref.WeakSet[IOUser] = weakref.WeakSet()

    def call(self, func: Callable[..., object], *args: object) -> None:
        """Call ``func`` in the loop, soon. From any thread; nothing happens at exit.

        Raises:
            RuntimeError: this process was forked from one that uses engines elsewhere.
        """
        loop = self._running_loop()
        try:
            loop.call_soon_threadsafe(func, *args)
        except RuntimeError:
            pass  # it was closed: the interpreter is shutting down

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in the loop, and wait for it in the caller's.

        Cancellation: the coroutine is cancelled; the first ``CancelledError`` is raised when it
        has ended, however often the caller is cancelled meanwhile.

        Raises:
            RuntimeError: this process was forked from one that uses engines elsewhere.
            EngineDead: the interpreter is shutting down.
            BaseException: whatever the coroutine raises.
        """
        loop = self._running_loop()
        if loop.is_closed():
            raise EngineDead(_EXIT)
        tasks: list[asyncio.Task[T]] = []

        def cancel() -> None:
            self.call(lambda: [task.cancel() for task in tasks])

        pending: Pending[T] = Pending(cancel)

        def ended(task: asyncio.Task[T]) -> None:
            if task.cancelled():  # by the caller, who then is told so, or at exit
                pending.error = EngineDead(_EXIT)
            elif (error := task.exception()) is not None:
                pending.error = error
            else:
                pending.value = task.result()
            pending.announce()

        def look() -> None:
            """Whether anybody waits: a loop that is closed cancels nothing."""
            if pending.orphaned:
                tasks[0].cancel()
            elif not tasks[0].done():
                loop.call_later(_LOOK, look)

        def begin() -> None:
            tasks.append(loop.create_task(work()))
            tasks[0].add_done_callback(ended)
            loop.call_later(_LOOK, look)

        self.call(begin)
        try:
            await outlast(pending.out, cancel)
        finally:
            if not pending.out.done():  # the coroutine is being destroyed, its loop is gone
                cancel()
        return pending.outcome()

    def tell_at_exit(self, user: IOUser) -> None:
        """Tell ``user`` when the interpreter exits, if it is still there."""
        self._users.add(user)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is None:
            with self._lock:  # not taken afterwards: a signal handler may be where this is
                if self._loop is None:
                    self._start()
                loop = self._loop
        assert loop is not None
        if self._pid != os.getpid():
            raise RuntimeError(
                "an engine in another process cannot be used after os.fork(): start the "
                "process with the 'spawn' method instead"
            )
        return loop

    def _start(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.SelectorEventLoop()
        ready = threading.Event()
        thread = threading.Thread(
            target=self._main, args=(self._loop, ready), name="mlx-engine io", daemon=True
        )
        thread.start()
        ready.wait()
        atexit.register(self._close, thread)

    def _main(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(ready.set)
        loop.run_forever()

    def _close(self, thread: threading.Thread) -> None:
        """At exit: end the loop, so that nothing runs while the interpreter is torn down."""
        loop = self._loop
        if loop is None or self._pid != os.getpid():
            return
        ending = asyncio.run_coroutine_threadsafe(self._end_all(), loop)
        with contextlib.suppress(TimeoutError):
            ending.result(2 * _LAST)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_LAST)
        if not thread.is_alive():
            loop.close()

    async def _end_all(self) -> None:
        """Tell everybody that there will be no more, and let what goes on end."""
        for user in list(self._users):
            user.interpreter_exits()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST)


io_thread = IOThread()
