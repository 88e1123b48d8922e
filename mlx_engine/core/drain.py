"""The drain: waiting for work to its end, whatever happens to whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def wait_shielded(
    future: asyncio.Future[Any], on_cancel: Callable[[], None] | None = None
) -> None:
    """Wait until ``future`` is done, however often the caller is cancelled meanwhile.

    This is the drain. ``asyncio.wait`` leaves the future alone when its caller is
    cancelled. The future's own outcome is not looked at.

    Args:
        future: of the running event loop; a task is a future.
        on_cancel: called once, at the first cancellation.

    Raises:
        asyncio.CancelledError: the first one received, after ``future`` is done.
    """
    try:
        await asyncio.wait({future})
    except asyncio.CancelledError:
        try:
            if on_cancel is not None:
                on_cancel()
        finally:
            await _stay(future)
        raise


async def _stay(future: asyncio.Future[Any]) -> None:
    """Wait until it is done, whoever cancels the caller; that has been told already.

    anyio cancels again and again, so a scope keeps it away. Others need none, and anyio never
    lets go of a task within a scope whose event loop is closed.
    """
    while not future.done():
        by_anyio = anyio.current_effective_deadline() == -math.inf
        with anyio.CancelScope(shield=True) if by_anyio else contextlib.nullcontext():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                continue


async def finish(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Do ``work()`` in a task of its own, to its end, however often the caller is cancelled.

    Whoever ends an event loop cancels all of its tasks, that one as well: then it is done anew,
    so it must be possible to do it twice.

    Raises:
        asyncio.CancelledError: the first one received, when the work is over.
        BaseException: whatever the work raises.
    """
    cancelled: asyncio.CancelledError | None = None
    while True:
        task = asyncio.ensure_future(work())
        try:
            await wait_shielded(task)
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
        if not task.cancelled():
            break
    if cancelled is None:
        return task.result()
    task.exception()  # nobody gets it
    try:
        raise cancelled
    finally:
        del cancelled  # no cycle from its traceback to this frame


async def clean_up(
    error: BaseException | None,
    work: Callable[[], Coroutine[Any, Any, object]],
    home: asyncio.AbstractEventLoop | None = None,
) -> None:
    """Await ``work()`` after ``error``: if that was a cancellation, it is the one to tell.

    A ``CancelledError`` out of the work is dropped when ``error`` is one already, since the
    caller is about to raise that; otherwise it goes on. Nothing is done in a coroutine that is
    being destroyed, as ``is_destroyed`` tells.
    """
    if is_destroyed(error, home):
        return
    try:
        await work()
    except asyncio.CancelledError:
        if not isinstance(error, asyncio.CancelledError):
            raise


def is_destroyed(
    error: BaseException | None, home: asyncio.AbstractEventLoop | None = None
) -> bool:
    """Whether the coroutine that got ``error`` is being destroyed, so that it cannot await.

    That may be within another event loop. In the loop ``home``, an ``async with`` is left with the
    same error by a generator that is closed, which may await.
    """
    running = asyncio._get_running_loop()
    destroyed = isinstance(error, GeneratorExit) and running is not home
    return error is not None and (running is None or destroyed)
