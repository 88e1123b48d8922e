"""Who may enter an engine, how long they may wait, and the counters of what became of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_engine.config import QueueConfig
from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.lifecycle import Lifecycle, Ticket
from mlx_engine.core.work import PendingWork
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import EngineBusy, MLXEngineError
from mlx_engine.outputs import GenerationResult

_FIRST_GUESS = 1.0  # seconds that a request takes, before any has been seen
_LOOK = 0.01  # seconds, at least, between two looks at work that is being prepared
_SMOOTHING = 0.2  # weight of the newest request in the average


class RequestTicket(Ticket):
    """The ticket of a user's request: limits apply to it, and it is counted."""


class Admission:
    """The door of one engine: queue limits, tickets in flight, and counters."""

    def __init__(self, lifecycle: Lifecycle, limits: QueueConfig) -> None:
        self._lifecycle = lifecycle
        self._limits = limits
        self._lock = threading.RLock()  # stats() may be called by a signal handler
        # Requests and users' functions by their ids, and where they wait or waited.
        self._inside: dict[str, tuple[PendingWork[Any], WorkQueue[Any]]] = {}
        self._finished = self._cancelled = self._failed = self._rejected = 0
        self._seconds_per_request = _FIRST_GUESS
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In a fork of this process: nobody is inside, and the lock may be held."""
        self._lock = threading.RLock()
        self._inside = {}

    @contextmanager
    def enter(self, ticket: Ticket, work: PendingWork[Any], line: WorkQueue[Any]) -> Iterator[None]:
        """In flight from here until the work is over, which ``over`` is told of.

        Args:
            line: where the work will wait.

        Raises:
            EngineNotRunning: by the engine's state; only requests, not the engine's own work.
            EngineBusy: too many requests wait already.
        """

        def abort(error: MLXEngineError) -> bool:
            return line.abort(work, error)

        if not isinstance(ticket, RequestTicket):
            self._lifecycle.add(ticket, abort)
            yield
            return
        with self._lock:
            self._lifecycle.check_running()
            self._check_room(line)
            self._lifecycle.admit(ticket, abort)
            self._inside[ticket.request_id] = work, line
        timers: list[asyncio.TimerHandle] = []  # one or none
        if self._limits.max_wait:
            self._limit_wait(timers, work, line)
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def over(self, ticket: Ticket, work: PendingWork[Any]) -> None:
        """The work is over: count it, and take the ticket out of flight. From any thread."""
        with self._lock:
            if self._inside.pop(ticket.request_id, None) is not None:
                self._count(work)
        self._lifecycle.done(ticket)

    def counts(self) -> dict[str, int]:
        """The fields of ``EngineStats`` that tell of requests."""
        with self._lock:
            return {
                "running": sum(work.running for work, _ in self._inside.values()),
                "waiting": sum(work.waiting for work, _ in self._inside.values()),
                "finished": self._finished,
                "cancelled": self._cancelled,
                "failed": self._failed,
                "rejected": self._rejected,
            }

    def _waiting(self, line: WorkQueue[Any]) -> int:
        return sum(work.waiting for work, where in self._inside.values() if where is line)

    def _check_room(self, line: WorkQueue[Any]) -> None:
        if self._limits.queue_limit is None and self._limits.max_wait != 0:
            return
        inside, limit = self._waiting(line), self._limits.queue_limit
        waiting = max(0, inside - line.free)
        full = limit is not None and waiting >= limit
        busy = inside >= max(1, line.free) or line.busy
        if (full or self._limits.max_wait == 0) and busy:
            self._rejected += 1
            why = f"queue_limit={limit}" if full else "max_wait=0"
            raise self._busy(f"{waiting} requests are waiting ({why})", waiting, line)

    def _limit_wait(
        self, timers: list[asyncio.TimerHandle], work: PendingWork[Any], line: WorkQueue[Any]
    ) -> None:
        assert self._limits.max_wait is not None
        seconds = self._limits.max_wait if not timers else max(self._limits.max_wait, _LOOK)
        loop = asyncio.get_running_loop()
        timers[:] = [loop.call_later(seconds, self._expire, timers, work, line)]

    def _expire(
        self, timers: list[asyncio.TimerHandle], work: PendingWork[Any], line: WorkQueue[Any]
    ) -> None:
        if work.preparing:  # that is work, not waiting
            self._limit_wait(timers, work, line)
            return
        waiting = line.waiting_with(work)  # many may expire at once: nothing is counted here
        error = self._busy(
            f"the request has waited for {self._limits.max_wait} s (max_wait)", waiting, line
        )
        line.expire(work, error)

    def _busy(self, message: str, waiting: int, line: WorkQueue[Any]) -> EngineBusy:
        retry_after = self._seconds_per_request * (waiting + 1) / line.width
        return EngineBusy(
            f"{message}; try again in about {retry_after:.1f} s", retry_after=retry_after
        )

    def _count(self, work: PendingWork[Any]) -> None:
        result = work.value if isinstance(work.value, GenerationResult) else None
        if isinstance(work.aborted_with, EngineBusy):
            self._rejected += 1
        elif work.error is not None and not work.started:
            self._failed += 1  # refused: it never entered the queue
        elif work.cancelled or (result and result.finish_reason == "cancelled"):
            self._cancelled += 1
        elif work.error is not None:
            self._failed += 1
        else:
            self._finished += 1
        if work.ended:
            seconds = work.ended - work.started
            self._seconds_per_request += _SMOOTHING * (seconds - self._seconds_per_request)
