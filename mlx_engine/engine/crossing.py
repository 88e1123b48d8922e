"""Between the event loop and threads other than the MLX thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from mlx_engine.outputs import Progress, ProgressCallback
from mlx_engine.turn import outlast

T = TypeVar("T")


def in_this_loop(callback: ProgressCallback | None) -> ProgressCallback | None:
    """``callback``, called in the running event loop from whatever thread."""
    if callback is None:
        return None
    loop = asyncio.get_running_loop()

    def call(progress: Progress) -> None:
        try:
            loop.call_soon_threadsafe(callback, progress)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told

    return call


async def off_loop(func: Callable[[], T], stop: threading.Event) -> T:
    """Run work that is not MLX's in a thread of its own; cancelled, it is asked to stop."""
    future = asyncio.get_running_loop().run_in_executor(None, func)
    future.add_done_callback(lambda f: f.cancelled() or f.exception())  # it may be discarded
    await outlast(future, stop.set)
    return future.result()
