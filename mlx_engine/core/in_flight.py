"""The registry of what is in flight in an engine: admission, counters and shutdown read it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from mlx_engine.core.wakeup import Broadcast
from mlx_engine.core.work import PendingWork
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import MLXEngineError

Abort = Callable[[MLXEngineError], bool]


class InFlight:
    """Something in flight: a request, a user's function, or the engine's own work.

    Args:
        request_id: its name.
        counted: whether it is in line with the requests: queue limits apply to it, and
            ``stats()`` counts it.
        reported: whether a shutdown reports on it: it is a request, whose name its caller knows.
        abortable: whether a shutdown may abort it; else it does not wait for it either.
        loop: the event loop without which it would never end; ``None`` if another thread ends it.
        max_wait: seconds that its caller lets it wait for its turn; ``None`` is no limit of his.

    Attributes:
        abort: ends it promptly with an error, and tells whether it did.
        aborted: whether a shutdown has ended it.
        work: the work that its caller waits for, once there is some.
        queue: where that work waits.
    """

    def __init__(
        self,
        request_id: str,
        *,
        counted: bool = False,
        reported: bool = False,
        abortable: bool = True,
        loop: asyncio.AbstractEventLoop | None = None,
        max_wait: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.max_wait = max_wait
        self.counted = counted
        self.reported = reported
        self.abortable = abortable
        self.abort: Abort | None = None
        self.aborted = False
        self.work: PendingWork[Any] | None = None
        self.queue: WorkQueue[Any] | None = None
        self._loop = loop

    @property
    def orphaned(self) -> bool:
        """Whether nobody will ever end it."""
        return self._loop is not None and self._loop.is_closed()

    def waits_in(self, queue: WorkQueue[Any], work: PendingWork[Any]) -> None:
        """``work`` is what it does, and waits there; to abort it is to abort that."""

        def abort(error: MLXEngineError) -> bool:
            return queue.abort(work, error)

        self.queue, self.work, self.abort = queue, work, abort


class InFlightRegistry:
    """Registry of what is in flight in one engine, by name. All of it may be used from any thread.

    Attributes:
        lock: held for a change; also for those of what depends on it.
        changed: tells of changes.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # stats() may be called by a signal handler
        self.changed = Broadcast()
        self._entries: dict[str, InFlight] = {}
        self._ids: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    def after_fork(self) -> None:
        """In a fork of this process: nothing is in flight, and the lock may be held."""
        self.lock, self.changed, self._entries = threading.RLock(), Broadcast(), {}

    def new_id(self, prefix: str) -> str:
        """A name that nothing else in this engine has."""
        with self.lock:
            return f"{prefix}-{next(self._ids[prefix])}"

    def add(self, entry: InFlight) -> None:
        """Put it in flight."""
        with self.lock:
            self._entries[entry.request_id] = entry

    def remove(self, entry: InFlight) -> bool:
        """Take it out of flight; whether it was."""
        with self.lock:
            found = self._entries.pop(entry.request_id, None) is not None
            self.changed.notify()
        return found

    def __contains__(self, entry: InFlight) -> bool:
        return entry.request_id in self._entries

    def __iter__(self) -> Iterator[InFlight]:
        with self.lock:
            return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)
