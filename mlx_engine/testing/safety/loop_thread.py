"""An event loop that stays, in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from mlx_engine.testing.safety.timeouts import Timeouts
from mlx_engine.testing.safety.ways import Work

T = TypeVar("T")

_GRACE: Final = 2.0  # seconds in which what is left in it may end


class LoopThread:
    """asyncio's own event loop, where an engine is started and asked between two trials.

    Most engines do not care where they were started; a manager of replicas watches them there.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, it runs. What is left in it is cancelled at the end."""
        ready = threading.Event()

        async def live() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._end.wait()

        def run() -> None:
            asyncio.run(live())

        thread = threading.Thread(target=run, name="cancellation check's loop", daemon=True)
        thread.start()
        ready.wait()
        assert self._loop is not None
        assert self._end is not None
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(_GRACE)

    def run(self, work: Work[T], limit: float, what: str) -> T:
        """Do it there, and return or raise its outcome.

        Args:
            limit: seconds that it may take.
            what: what it is, as a sentence begins.

        Raises:
            Hang: it has taken longer.
            Exception: what it raises.
        """
        loop = self._loop
        assert loop is not None
        future = asyncio.run_coroutine_threadsafe(work(), loop)
        with self._timeouts.within(limit, what, loop, future.cancel):
            try:
                return future.result()
            except concurrent.futures.CancelledError as error:
                raise RuntimeError(f"{what} was cancelled, by nobody here") from error
