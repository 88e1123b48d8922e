"""Requests that wait until a replica is up: how many there may be, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_engine.config import BatchedOptions, QueueConfig
from mlx_engine.errors import EngineBusy

# While a replica restarts, which takes as long as its model takes to load.
BOUNDED = QueueConfig(queue_limit=1024, max_wait=600.0)


def waiting_limits(options: BatchedOptions) -> QueueConfig:
    """The limits of a manager: those that its replicas are given, or else bounded ones."""
    return QueueConfig(
        queue_limit=options.get("queue_limit", BOUNDED.queue_limit),
        max_wait=options.get("max_wait", BOUNDED.max_wait),
    )


class WaitingRoom:
    """Counts those who wait, and refuses who is one too many, or has waited too long.

    Args:
        limits: ``queue_limit`` is of all of them, ``max_wait`` of each one's waiting together.

    Attributes:
        waiting: how many wait now.
        rejected: how many were refused.
    """

    def __init__(self, limits: QueueConfig) -> None:
        self.waiting = self.rejected = 0
        self._limits = limits
        self._lock = threading.RLock()  # a coroutine that waits may be destroyed anywhere

    def after_fork(self) -> None:
        """Forget who waits in a fork of this process, where the lock may be held."""
        self._lock, self.waiting = threading.RLock(), 0

    @contextmanager
    def entered(self, retry_after: float, max_wait: float | None = None) -> Iterator[None]:
        """Count one more that waits, within.

        Args:
            retry_after: seconds until a replica is likely to be up.
            max_wait: its caller's own limit.

        Raises:
            EngineBusy: too many wait already, or nobody may.
        """
        with self._lock:
            refused = self._refused(max_wait)
            if refused is None:
                self.waiting += 1
        if refused is not None:
            raise self._busy(
                f"no replica is up, and {self.waiting} requests wait for one ({refused})",
                retry_after,
            )
        try:
            yield
        finally:
            with self._lock:
                self.waiting -= 1

    def left(
        self, waited: float, retry_after: float, max_wait: float | None = None
    ) -> float | None:
        """Seconds that one may go on waiting; ``None`` is for ever.

        Args:
            max_wait: its caller's own limit.

        Raises:
            EngineBusy: it has waited too long.
        """
        if (most := self._most(max_wait)) is None:
            return None
        if waited < most:
            return most - waited
        raise self._busy(
            f"the request has waited for {most:g} s (max_wait) and no replica is up", retry_after
        )

    def _most(self, max_wait: float | None) -> float | None:
        return min((w for w in (self._limits.max_wait, max_wait) if w is not None), default=None)

    def _refused(self, max_wait: float | None) -> str | None:
        """The limit that lets nobody in now, if one does."""
        limit = self._limits.queue_limit
        if limit is not None and self.waiting >= limit:
            return f"queue_limit={limit}"
        return "max_wait=0" if self._most(max_wait) == 0 else None

    def _busy(self, message: str, retry_after: float) -> EngineBusy:
        with self._lock:
            self.rejected += 1
        return EngineBusy(
            f"{message}; try again in about {retry_after:.1f} s", retry_after=retry_after
        )
