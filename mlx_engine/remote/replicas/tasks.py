"""Tasks and their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from mlx_engine.core.drain import wait_shielded

T = TypeVar("T")


def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task, as a callback that gives nothing; if its loop is closed, it is over."""
    if not task.get_loop().is_closed():
        task.cancel()


def cancel_from_anywhere(task: asyncio.Task[Any]) -> None:
    """Cancel a task, from any thread."""
    try:
        task.get_loop().call_soon_threadsafe(task.cancel)
    except RuntimeError:
        pass  # its loop is closed


def look_at(task: asyncio.Task[Any]) -> None:
    """Look at the error of a task that is done, or asyncio complains that nobody has."""
    if not task.cancelled():
        task.exception()


async def until_done(task: asyncio.Task[T]) -> bool:
    """Wait for a task, whatever its end; ``False`` if it was cancelled, by somebody else.

    Cancellation: the task is cancelled; ``CancelledError`` is raised when it is over.
    """
    try:
        await wait_shielded(task, lambda: cancel(task))
    finally:
        if task.done():
            look_at(task)
    return not task.cancelled()


async def all_results(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Make all calls at once, each to its end; raises the first error."""
    ends = await asyncio.gather(*calls, return_exceptions=True)
    results: list[T] = []
    for end in ends:
        if isinstance(end, BaseException):
            raise end
        results.append(end)
    return results
