"""Messages on their way out, from any thread, together if they come together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from mlx_engine.errors import GenerationError, describe
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.messages import (
    Chunk,
    Done,
    ErrorReply,
    Facts,
    Heartbeat,
    ProgressUpdate,
    encode,
)
from mlx_engine.remote.wire.values import error_to_wire

_GAP = 0.004  # seconds between two frames, at least


class Outbox:
    """Gathers messages until the event loop gets to them; then they are one frame.

    A decode step has a chunk for each request of a batch; the loop gets to them when the MLX
    thread lets go of the GIL, so that they travel together without waiting for each other.

    A part of an answer, or a sign of life, that comes within four milliseconds after a frame waits
    for that long: a frame costs both sides a wake-up, 0.1 ms each, which at a millisecond a token
    is more than the tokens' own Python. Whatever somebody waits for, the end of an answer first of
    all, goes at once, and takes with it what waits.

    Args:
        write: sends the payload of a frame; in the running event loop.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._write = write
        self._waiting: deque[Any] = deque()
        self._last: Callable[[], object] | None = None
        self._scheduled = False
        self._urgent = False  # and what waits is to go at once
        self._timer: asyncio.TimerHandle | None = None  # until it may go
        self._flushed = 0.0  # when, by the loop's clock

    def put(self, message: object) -> None:
        """Send a message, soon, in order. From any thread."""
        self._waiting.append(message)
        self._schedule(urgent=not isinstance(message, Chunk | ProgressUpdate | Heartbeat))

    def _schedule(self, *, urgent: bool = False) -> None:
        if self._scheduled and (self._urgent or not urgent):
            return
        self._scheduled = True
        self._urgent = self._urgent or urgent
        try:
            self._loop.call_soon_threadsafe(self._flush_soon)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told

    def put_last(self, make: Callable[[], object]) -> None:
        """Have what ``make`` makes end the next frame, however often it is asked for."""
        self._last = make
        self._schedule()

    def _flush_soon(self) -> None:
        wait = self._flushed + _GAP - self._loop.time()
        if self._urgent or wait <= 0:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait, self.flush)

    def flush(self) -> None:
        """Send what there is, now. In the loop."""
        self._scheduled = self._urgent = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        messages = []
        while self._waiting:
            messages.append(self._waiting.popleft())
        if self._last is not None:
            make, self._last = self._last, None
            messages.append(make())
        if not messages:
            return
        self._flushed = self._loop.time()
        try:
            payload = encode(messages)
            if len(payload) <= MAX_FRAME:
                self._write(payload)
                return
        except Exception:  # noqa: BLE001 - one of them cannot be written, of whatever kind
            pass
        for message in messages:
            self._write(_one(message))


def _one(message: Any) -> bytes:
    """A message by itself; if it cannot travel, what says so to whoever waits for it."""
    try:
        payload = encode([message])
        problem = f"it would take {len(payload)} bytes"
        if len(payload) <= MAX_FRAME:
            return payload
    except Exception as error:  # noqa: BLE001
        problem = describe(error)
    if not isinstance(message, Done | Facts | ErrorReply):
        return encode([])  # nobody waits for it
    refusal = GenerationError(f"the answer cannot go to another process: {problem}")
    return encode([error_to_wire(message.number, refusal)])
