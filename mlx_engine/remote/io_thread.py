"""The I/O thread: one event loop, on a thread of its own, for all engines that are elsewhere.

Applications' loops come and go, and may be busy; this one is there as long as the process, so
that an engine can be used from any of them, and its end is noticed whatever they do. It is
asyncio's own loop, whichever one the application runs.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mlx_engine.errors import EngineDead
from mlx_engine.turn import Pending, outlast

T = TypeVar("T")


class IOThread:
    """An event loop on a daemon thread, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

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
            raise EngineDead("the interpreter is shutting down")
        tasks: list[asyncio.Task[T]] = []

        def cancel() -> None:
            self.call(lambda: [task.cancel() for task in tasks])

        pending: Pending[T] = Pending(cancel)

        def ended(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                pending.error = asyncio.CancelledError()
            elif (error := task.exception()) is not None:
                pending.error = error
            else:
                pending.value = task.result()
            pending.announce()

        def begin() -> None:
            tasks.append(loop.create_task(work()))
            tasks[0].add_done_callback(ended)

        self.call(begin)
        try:
            await outlast(pending.out, cancel)
        finally:
            if not pending.out.done():  # the coroutine is being destroyed, its loop is gone
                cancel()
        return pending.outcome()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._start()
            elif self._pid != os.getpid():
                raise RuntimeError(
                    "an engine in another process cannot be used after os.fork(): start the "
                    "process with the 'spawn' method instead"
                )
            assert self._loop is not None
            return self._loop

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
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1)
        if not thread.is_alive():
            for task in asyncio.all_tasks(loop):
                task.get_coro().close()
            loop.close()


io_thread = IOThread()
