"""Between the event loop and threads other than the MLX thread."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from mlx_engine.outputs import Progress, ProgressCallback
from mlx_engine.turn import outlast

T = TypeVar("T")


def in_this_loop(callback: ProgressCallback | None) -> ProgressCallback | None:
    """``callback``, called in the running event loop from whatever thread."""
    if callback is None:
        return None
    loop = asyncio.get_running_loop()
    # Not the context of a turn, in which the callback could not begin a request of its own.
    context = contextvars.copy_context()

    def call(progress: Progress) -> None:
        try:
            loop.call_soon_threadsafe(callback, progress, context=context)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told

    return call


async def off_loop(func: Callable[[], T], stop: threading.Event) -> T:
    """Run work that is not MLX's in a thread of its own; cancelled, it is asked to stop.

    Raises:
        asyncio.CancelledError: the first one, once the work is over.
        BaseException: whatever ``func`` raises.
    """
    work = _Work(func)
    threading.Thread(target=work.run, name="find model").start()
    try:
        await outlast(work.out, stop.set)
    finally:
        if not work.out.done():  # the coroutine is being destroyed, its loop is gone
            stop.set()
    return work.outcome()


class _Work(Generic[T]):
    """A function, and what became of it."""

    def __init__(self, func: Callable[[], T]) -> None:
        self._func = func
        self._loop = asyncio.get_running_loop()
        self._value: T | None = None
        self._error: BaseException | None = None
        self.out: asyncio.Future[None] = self._loop.create_future()

    def run(self) -> None:
        """In the thread."""
        try:
            self._value = self._func()
        except BaseException as error:  # noqa: BLE001 - the border: the caller raises it
            self._error = error
        try:
            self._loop.call_soon_threadsafe(self.out.set_result, None)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told

    def outcome(self) -> T:
        """Return or raise what the function did."""
        error, self._error = self._error, None
        if error is None:
            return self._value  # type: ignore[return-value]
        try:
            raise error
        finally:
            del error  # no cycle from the traceback to this frame
