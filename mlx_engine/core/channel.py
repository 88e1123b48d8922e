"""Chunks of one stream on their way from the MLX thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from mlx_engine.core.wakeup import wake
from mlx_engine.errors import StreamConsumed
from mlx_engine.outputs import GenerationChunk

# A reader of chunks that are there already gives way to others in its event loop, and hears that it
# was cancelled, after so many of them or so many seconds.
_SOME = 64
_WHILE = 0.005


class Channel:
    """Chunks on their way from the MLX thread to the event loop.

    The buffer has no bound of its own: a request makes at most ``max_tokens`` chunks, and a
    slow reader must not keep the MLX thread from other requests. The loop is woken only
    when the reader sleeps.

    No lock, since all Python that runs in the loop keeps the MLX thread from its own: the
    reader first announces that it sleeps and then looks once more, the writer first appends
    and then looks for a sleeper. So one of the two always sees the other, and whoever takes
    the sleeper out of its deque wakes that one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sleepers: deque[asyncio.Future[None]] = deque()  # one or none
        self._ended = False
        self.chunks: deque[GenerationChunk] = deque()
        self.pushed = False
        self._read = 0  # chunks since the reader last gave way
        self._until = loop.time() + _WHILE  # when it is to do so, at the latest

    def is_others_turn(self) -> bool:
        """Whether the reader has had the event loop to itself for so long that it gives way."""
        self._read += 1
        if self._read < _SOME and self._loop.time() < self._until:
            return False
        self._give_way()
        return True

    def _give_way(self) -> None:
        self._read, self._until = 0, self._loop.time() + _WHILE

    def push(self, chunk: GenerationChunk) -> None:
        """From any thread."""
        self.chunks.append(chunk)
        self.pushed = True
        self._rouse()

    def end(self) -> None:
        """No more chunks will come."""
        self._ended = True
        self._rouse()

    async def get(self) -> GenerationChunk | None:
        """The next chunk; ``None`` after the last one. Cancelling it loses no chunk."""
        while True:
            if self._sleepers:
                raise StreamConsumed("another task is reading this stream")
            sleeper: asyncio.Future[None] = self._loop.create_future()
            self._sleepers.append(sleeper)
            try:
                if not self.chunks and not self._ended:
                    await sleeper
                    self._give_way()
            finally:
                self._sleepers.clear()  # of this one, unless the writer has it
            if self.chunks:
                return self.chunks.popleft()
            if self._ended:
                return None

    def _rouse(self) -> None:
        try:
            sleeper = self._sleepers.pop()
        except IndexError:
            return
        wake(sleeper)
