"""Who may enter an engine, how long they may wait, and the counters of what became of them.

Of two limits on waiting, the engine's and the caller's, the smaller one counts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from mlx_engine.config import QueueConfig
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle
from mlx_engine.core.work import PendingWork
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import EngineBusy
from mlx_engine.outputs import GenerationResult

_Kind = Literal["requests", "questions"]

# Seconds that one takes, before any has been seen.
_FIRST_GUESS: dict[_Kind, float] = {"requests": 1.0, "questions": 0.1}
_LOOK = 0.01  # seconds, at least, between two looks at work that is being prepared
_SMOOTHING = 0.2  # weight of the newest request in the average


class Admission:
    """The door of one engine: queue limits and counters of what is in flight."""

    def __init__(self, lifecycle: Lifecycle, limits: QueueConfig) -> None:
        self._lifecycle = lifecycle
        self._in_flight = lifecycle.in_flight
        self._limits = limits
        self._finished = self._cancelled = self._failed = self._rejected = 0
        self._seconds = dict(_FIRST_GUESS)

    @contextmanager
    def enter(
        self, entry: InFlight, work: PendingWork[Any], queue: WorkQueue[Any]
    ) -> Iterator[None]:
        """In flight from here until the work is over, which ``over`` is told of.

        Args:
            queue: where the work will wait.

        Raises:
            EngineNotRunning: by the engine's state; only of what is counted.
            EngineBusy: too many requests wait already.
        """
        entry.waits_in(queue, work)
        if not entry.counted:
            self._in_flight.add(entry)
            yield
            return
        with self._in_flight.lock:
            self._lifecycle.check_running()
            self._check_room(queue, "requests", max_wait := self._max_wait(entry))
            self._in_flight.add(entry)
        with self._waits(work, queue, "requests", max_wait):
            yield

    @contextmanager
    def ask(self, entry: InFlight, work: PendingWork[Any], queue: WorkQueue[Any]) -> Iterator[None]:
        """As ``enter``, for a question: the limits are those of requests, in a line of its own.

        Neither is counted in the other's line: requests wait for turns, and questions take none.
        """
        entry.waits_in(queue, work)
        with self._in_flight.lock:
            self._lifecycle.check_running()
            self._check_room(queue, "questions", max_wait := self._max_wait(entry))
            self._in_flight.add(entry)
        with self._waits(work, queue, "questions", max_wait):
            yield

    @contextmanager
    def _waits(
        self,
        work: PendingWork[Any],
        queue: WorkQueue[Any],
        kind: _Kind,
        max_wait: float | None,
    ) -> Iterator[None]:
        timers: list[asyncio.TimerHandle] = []  # one or none
        if max_wait and not math.isinf(max_wait):
            self._limit_wait(timers, work, queue, kind, max_wait)
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def over(self, entry: InFlight, work: PendingWork[Any]) -> None:
        """The work is over: count it, and take it out of flight. From any thread."""
        with self._in_flight.lock:
            if not self._in_flight.remove(entry):
                return
            if entry.counted:
                self._count(work)
                self._note_seconds(work, "requests")

    def answered(self, entry: InFlight, work: PendingWork[Any]) -> None:
        """As ``over``, for a question."""
        with self._in_flight.lock:
            if self._in_flight.remove(entry):
                self._note_seconds(work, "questions")

    def counts(self) -> dict[str, int]:
        """The fields of ``EngineStats`` that tell of requests."""
        with self._in_flight.lock:
            inside = [one.work for one in self._in_flight if one.counted and one.work is not None]
            return {
                "running": sum(work.running for work in inside),
                "waiting": sum(work.waiting for work in inside),
                "finished": self._finished,
                "cancelled": self._cancelled,
                "failed": self._failed,
                "rejected": self._rejected,
            }

    def _waiting(self, queue: WorkQueue[Any], kind: _Kind) -> int:
        counted = kind == "requests"
        inside = [
            one.work for one in self._in_flight if one.counted is counted and one.queue is queue
        ]
        return sum(work is not None and work.waiting for work in inside)

    def _max_wait(self, entry: InFlight) -> float | None:
        given = [one for one in (self._limits.max_wait, entry.max_wait) if one is not None]
        return min(given, default=None)

    def _check_room(self, queue: WorkQueue[Any], kind: _Kind, max_wait: float | None) -> None:
        if self._limits.queue_limit is None and max_wait != 0:
            return
        inside, limit = self._waiting(queue, kind), self._limits.queue_limit
        waiting = max(0, inside - queue.free)
        full = limit is not None and waiting >= limit
        busy = inside >= max(1, queue.free) or queue.busy
        if (full or max_wait == 0) and busy:
            self._rejected += kind == "requests"
            why = f"queue_limit={limit}" if full else "max_wait=0"
            what = f"{waiting} {kind} are waiting" if waiting else "no place is free now"
            raise self._busy(f"{what} ({why})", waiting, queue, kind)

    def _limit_wait(
        self,
        timers: list[asyncio.TimerHandle],
        work: PendingWork[Any],
        queue: WorkQueue[Any],
        kind: _Kind,
        max_wait: float,
    ) -> None:
        seconds = max_wait if not timers else max(max_wait, _LOOK)
        loop = asyncio.get_running_loop()
        timers[:] = [loop.call_later(seconds, self._expire, timers, work, queue, kind, max_wait)]

    def _expire(
        self,
        timers: list[asyncio.TimerHandle],
        work: PendingWork[Any],
        queue: WorkQueue[Any],
        kind: _Kind,
        max_wait: float,
    ) -> None:
        if work.preparing:  # that is work, not waiting
            self._limit_wait(timers, work, queue, kind, max_wait)
            return
        waiting = queue.waiting_with(work)  # many may expire at once: nothing is counted here
        message = f"the {kind[:-1]} has waited for {max_wait:g} s (max_wait)"
        queue.expire(work, self._busy(message, waiting, queue, kind))

    def _busy(self, message: str, waiting: int, queue: WorkQueue[Any], kind: _Kind) -> EngineBusy:
        retry_after = self._seconds[kind] * (waiting + 1) / queue.width
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

    def _note_seconds(self, work: PendingWork[Any], kind: _Kind) -> None:
        if work.ended:
            seconds = work.ended - work.started
            self._seconds[kind] += _SMOOTHING * (seconds - self._seconds[kind])
