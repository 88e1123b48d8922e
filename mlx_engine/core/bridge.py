"""Between the event loop and threads other than the MLX thread."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import TypeVar

from mlx_engine.checks import shown
from mlx_engine.core.drain import wait_shielded
from mlx_engine.core.threads import Start
from mlx_engine.core.wakeup import running_loop
from mlx_engine.core.work import ThreadJob
from mlx_engine.errors import EngineDead, InvalidRequest
from mlx_engine.outputs import Progress, ProgressCallback

T = TypeVar("T")


def checked_callback(on_progress: ProgressCallback | None) -> ProgressCallback | None:
    """``on_progress``, if it can be called; raises ``InvalidRequest`` if not."""
    if on_progress is not None and not callable(on_progress):
        raise InvalidRequest("on_progress", f"must be callable or None, not {shown(on_progress)}")
    of_its_class = getattr(type(on_progress), "__call__", None)  # noqa: B004 - not whether it has one
    if inspect.iscoroutinefunction(on_progress) or inspect.iscoroutinefunction(of_its_class):
        raise InvalidRequest(
            "on_progress",
            "must be a plain function, since nothing awaits it: no coroutine function",
        )
    return on_progress


def in_this_loop(callback: ProgressCallback | None) -> ProgressCallback | None:
    """``callback``, called in the running event loop from whatever thread."""
    if callback is None:
        return None
    loop = running_loop()
    # Not the context of a job, in which the callback could not begin a request of its own.
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
        EngineDead: no thread can be had for it.
        BaseException: whatever ``func`` raises.
    """
    job = ThreadJob(func)

    def work() -> None:
        job.execute()
        job.announce()

    def failed(error: EngineDead) -> None:
        job.error = error
        job.announce()

    def cancel() -> None:
        stop.set()
        start.give_up()

    start = Start(work, "find model", failed, daemon=False)
    start.begin()
    limit = start.limit()
    try:
        await wait_shielded(job.out, cancel)
    finally:
        limit.cancel()
        if not job.out.done():  # the coroutine is being destroyed, its loop is gone
            stop.set()
    return job.outcome()
