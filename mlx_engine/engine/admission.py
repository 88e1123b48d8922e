"""Who may enter an engine, how long they may wait, and the counters of what became of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_engine.config import QueueConfig
from mlx_engine.errors import EngineBusy, MLXEngineError
from mlx_engine.lifecycle import Lifecycle, Ticket
from mlx_engine.outputs import EngineStats, GenerationResult
from mlx_engine.turn import Turn
from mlx_engine.worker import mlx_thread

_FIRST_GUESS = 1.0  # seconds that a request takes, before any has been seen
_SMOOTHING = 0.2  # weight of the newest request in the average


class RequestTicket(Ticket):
    """The ticket of a user's request: limits apply to it, and it is counted."""


class Admission:
    """The door of one engine: queue limits, tickets in flight, and counters."""

    def __init__(self, lifecycle: Lifecycle, limits: QueueConfig) -> None:
        self._lifecycle = lifecycle
        self._limits = limits
        self._lock = threading.RLock()  # stats() may be called by a signal handler
        self._turns: dict[str, Turn[Any]] = {}  # of requests, by their ids
        self._finished = self._cancelled = self._failed = self._rejected = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._seconds_per_request = _FIRST_GUESS

    @contextmanager
    def enter(self, ticket: Ticket, turn: Turn[Any]) -> Iterator[None]:
        """In flight from here until the turn is over, which ``over`` is told of.

        Raises:
            EngineNotRunning: by the engine's state; only requests, not the engine's own work.
            EngineBusy: too many requests wait already.
        """

        def abort(error: MLXEngineError) -> bool:
            return mlx_thread.abort(turn, error)

        if not isinstance(ticket, RequestTicket):
            self._lifecycle.add(ticket, abort)
            yield
            return
        with self._lock:
            self._lifecycle.check_running()
            self._check_room()
            self._lifecycle.admit(ticket, abort)
            self._turns[ticket.request_id] = turn
        max_wait, timer = self._limits.max_wait, None
        if max_wait:
            timer = asyncio.get_running_loop().call_later(max_wait, self._expire, turn)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def over(self, ticket: Ticket, turn: Turn[Any]) -> None:
        """The turn is over: count it, and take the ticket out of flight. From any thread."""
        with self._lock:
            if self._turns.pop(ticket.request_id, None) is not None:
                self._count(turn)
        self._lifecycle.done(ticket)

    def stats(self) -> EngineStats:
        """A snapshot."""
        with self._lock:
            return EngineStats(
                state=self._lifecycle.state.value,
                running=sum(turn.running for turn in self._turns.values()),
                waiting=self._waiting(),
                finished=self._finished,
                cancelled=self._cancelled,
                failed=self._failed,
                rejected=self._rejected,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self._completion_tokens,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
            )

    def _waiting(self) -> int:
        return sum(turn.waiting for turn in self._turns.values())

    def _check_room(self) -> None:
        waiting, limit = self._waiting(), self._limits.queue_limit
        if waiting and not mlx_thread.locked:
            waiting -= 1  # the first one is about to be taken up
        full = limit is not None and waiting >= limit
        if (full or self._limits.max_wait == 0) and mlx_thread.busy:
            self._rejected += 1
            why = f"queue_limit={limit}" if full else "max_wait=0"
            raise self._busy(f"{waiting} requests are waiting ({why})", waiting)

    def _expire(self, turn: Turn[Any]) -> None:
        with self._lock:
            waiting = self._waiting()
        error = self._busy(
            f"the request has waited for {self._limits.max_wait} s (max_wait)", waiting
        )
        mlx_thread.expire(turn, error)

    def _busy(self, message: str, waiting: int) -> EngineBusy:
        retry_after = self._seconds_per_request * (waiting + 1)
        return EngineBusy(
            f"{message}; try again in about {retry_after:.1f} s", retry_after=retry_after
        )

    def _count(self, turn: Turn[Any]) -> None:
        result = turn.value if isinstance(turn.value, GenerationResult) else None
        if isinstance(turn.aborted_with, EngineBusy):
            self._rejected += 1
        elif turn.error is not None and not turn.started:
            self._failed += 1  # refused: it never entered the queue
        elif turn.cancelled or (result and result.finish_reason == "cancelled"):
            self._cancelled += 1
        elif turn.error is not None:
            self._failed += 1
        else:
            self._finished += 1
        if result is not None:
            self._prompt_tokens += result.usage.prompt_tokens
            self._completion_tokens += result.usage.completion_tokens
            self._prefill_seconds += result.timings.prefill
            self._decode_seconds += result.timings.decode
        if turn.ended:
            seconds = turn.ended - turn.started
            self._seconds_per_request += _SMOOTHING * (seconds - self._seconds_per_request)
