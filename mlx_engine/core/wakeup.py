"""Event loops of those who wait: the running one, and how others are woken from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop.

    Raises:
        RuntimeError: there is none, or it is another library's, as under anyio on trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "mlx_engine needs a running asyncio event loop: await it within asyncio.run(), or, "
            "with anyio, on the backend 'asyncio' rather than 'trio'"
        ) from None


def wake(future: asyncio.Future[None]) -> None:
    """Let those who wait for ``future`` go on. From any thread; any number of times."""
    saved: list[asyncio.Future[None]] | None = getattr(_saved, "futures", None)
    if saved is not None:
        saved.append(future)
        return
    _wake_in(future.get_loop(), [future])


@contextmanager
def waking_together() -> Iterator[None]:
    """Within, on this thread, wakes wait for the end of the block: one for each event loop.

    Waking a loop costs a system call and the GIL; a decode step may have many to wake.
    """
    if getattr(_saved, "futures", None) is not None:  # within another one, which wakes
        yield
        return
    futures: list[asyncio.Future[None]] = []
    _saved.futures = futures
    try:
        yield
    finally:
        _saved.futures = None
        by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for future in futures:
            by_loop.setdefault(future.get_loop(), []).append(future)
        for loop, its in by_loop.items():
            _wake_in(loop, its)


_saved = threading.local()


def _wake_in(loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[None]]) -> None:
    try:
        loop.call_soon_threadsafe(set_done, *futures)
    except RuntimeError:
        pass  # its loop is closed: nobody is left to be told


def set_done(*futures: asyncio.Future[None]) -> None:
    """Let those who wait for them go on. In their event loop."""
    for future in futures:
        if not future.done():
            future.set_result(None)


class Broadcast:
    """Tells all who wait for a change, in whatever event loops, that there was one.

    Its owner has a lock, under which it watches and notifies: no change goes unnoticed then.
    """

    def __init__(self) -> None:
        self._watchers: dict[asyncio.Future[None], None] = {}  # in the order in which they came

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._watchers)

    def watch(self) -> asyncio.Future[None]:
        """A future of the running loop that is done at the next change. Under the lock."""
        future: asyncio.Future[None] = running_loop().create_future()
        self._watchers[future] = None
        return future

    async def wait(self, future: asyncio.Future[None], timeout: float | None = None) -> None:
        """Wait for a change since ``watch``, for ``timeout`` seconds at most."""
        try:
            await asyncio.wait({future}, timeout=timeout)
        finally:
            self.forget(future)

    def forget(self, future: asyncio.Future[None]) -> None:
        """Nobody waits for a change by this future any more. From any thread."""
        self._watchers.pop(future, None)

    def notify(self) -> None:
        """There was a change. Under the lock; from any thread."""
        watchers, self._watchers = self._watchers, {}
        for future in list(watchers):  # one may be leaving
            wake(future)
