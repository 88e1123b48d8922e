"""Ctrl-C, in one place: what it does at each moment.

before and after a command    ends the process at once, there is nothing to clean up
while the engine works        cancels the work, which is drained; then KeyboardInterrupt
once more meanwhile           ends the process at once
at the prompt of a chat       KeyboardInterrupt
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from mlx_engine.cli.leaving import leave_at_once

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]


def do_nothing(signum: int = 0, frame: FrameType | None = None) -> None:
    """Between two moments in which Ctrl-C has a meaning."""


@contextmanager
def on_ctrl_c(handler: Handler) -> Iterator[None]:
    """Inside, ``handler`` answers Ctrl-C, unless the parent process had it ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    runner: asyncio.Runner,
    work: Coroutine[Any, Any, T],
    *,
    again: Callable[[], object] = leave_at_once,
) -> T:
    """Run ``work`` to its end; Ctrl-C cancels it.

    Args:
        again: what another Ctrl-C does while the cancelled work is drained.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and the work is over.
    """
    pressed = False

    async def watched() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def cancel(signum: int, frame: FrameType | None) -> None:
            nonlocal pressed
            if pressed:
                again()
            elif task is not None:
                pressed = True
                # Not from here: this runs between any two bytecodes of the main thread.
                loop.call_soon_threadsafe(task.cancel)

        with on_ctrl_c(cancel):
            return await work

    try:
        return runner.run(watched())
    except asyncio.CancelledError:
        if pressed:
            raise KeyboardInterrupt from None
        raise
