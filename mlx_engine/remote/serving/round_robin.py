"""Round robin: what the clients of a host have sent is worked off in slices, one after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_SLICE = 0.002  # seconds
_REST = 0.001  # seconds between two slices at least

# Does some of what there is to do, until a deadline by the loop's clock; whether there is more.
# Never raises.
Work = Callable[[float], bool]


class RoundRobin:
    """Gives each client a slice of the event loop in turn.

    After a slice the loop is left to all others for as long as it was used: to tokens on their
    way out, and to the MLX thread, which needs the GIL. So no client holds up another one's
    tokens, whatever it sends, and none its requests for longer than its share.
    """

    def __init__(self) -> None:
        self._queue: dict[Work, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._free_at = 0.0  # by the loop's clock

    def add(self, work: Work) -> None:
        """Have a client's work done: now, if nobody else has any and the loop is rested."""
        self._queue[work] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            if self._free_at <= loop.time():
                self._slice()
            else:
                self._timer = loop.call_at(self._free_at, self._slice)

    def discard(self, work: Work) -> None:
        """Forget a client's work."""
        self._queue.pop(work, None)

    def _slice(self) -> None:
        self._timer = None
        if not self._queue:
            return
        loop = asyncio.get_running_loop()
        work = next(iter(self._queue))
        del self._queue[work]
        began = time.thread_time()  # a processor that others have meanwhile is not used by it
        try:
            if work(loop.time() + _SLICE):
                self._queue[work] = None
        finally:  # whatever happens to one, the others go on
            used = time.thread_time() - began
            self._free_at = loop.time() + used
            if self._queue:
                self._timer = loop.call_later(max(used, _REST), self._slice)
