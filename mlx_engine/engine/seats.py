"""The queue of a batch: who gets the next place in it, and who is in it."""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from mlx_engine.errors import MLXEngineError
from mlx_engine.line import Line
from mlx_engine.outputs import GenerationResult
from mlx_engine.turn import Pending, Stage, Turn
from mlx_engine.worker import mlx_thread

_FAIR = 8  # every eighth place goes to whoever has waited longest, whatever the priorities
_SOME = 16  # requests that may be over and still in the heaps, whatever the queue
_arrivals = itertools.count()


class Seated(Protocol):
    """A request, as far as its place matters."""

    request_id: str
    priority: int

    def cancel(self) -> None:
        """Ask it to stop. From any thread."""

    def result(self) -> GenerationResult:
        """What has been made so far; final once it is over."""


R = TypeVar("R", bound=Seated)


class Seat(Pending[GenerationResult], Generic[R]):
    """A request on its way through the queue and the batch.

    Args:
        request: whose it is.
        on_done: called once it is over.
        on_enter: called when it is in the queue.
    """

    def __init__(
        self,
        request: R,
        on_done: Callable[[Pending[Any]], None],
        on_enter: Callable[[], None],
    ) -> None:
        super().__init__(request.cancel, on_done)
        self.request = request
        self.on_enter = on_enter
        self.rank = (request.priority, next(_arrivals))

    def __lt__(self, other: Seat[R]) -> bool:
        return self.rank < other.rank


class Seats(Line[Seat[R]], Generic[R]):
    """Requests that wait for a place in the batch, and those that have one.

    Entered and cancelled from event loops; taken up and ended on the MLX thread.

    Args:
        width: places in the batch.

    Attributes:
        burst: the turn in which the batch is worked on, or will be next.
        driving: held while it is looked whether there is to be one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.burst: Turn[None] | None = None
        self.driving = threading.Lock()
        self._running: dict[str, Seat[R]] = {}
        self._fresh: list[Seat[R]] = []  # a heap; those that are over are left in it for a while
        self._ready: list[Seat[R]] = []  # a heap
        self._by_arrival: list[tuple[int, Seat[R]]] = []  # a heap of those in ``_ready``
        self._taken = 0

    @property
    def free(self) -> int:
        """Places in the batch that nobody has."""
        return self.width - len(self._running)

    @property
    def busy(self) -> bool:
        """Whether a request that enters now would have to wait for others."""
        with self._changed:
            if len(self._queue) >= self.free:
                return True
        return mlx_thread.is_used_by_others(self.burst)

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue or self._running)

    def settle(self) -> bool:
        """``pending``; if nobody waits, those that are over are let go, on this thread."""
        with self._changed:
            self._sweep()
            return self.pending

    def _enter(self, one: Seat[R]) -> None:
        mlx_thread.check_outside()
        with self._changed:
            if one.stage is Stage.QUEUED:  # else it was aborted on its way here
                self._queue[one] = None
                self._sweep()
                heapq.heappush(self._fresh, one)
        one.on_enter()

    def _sweep(self) -> None:
        """Take those that are over out of the heaps, once most of them are, or all.

        They go by themselves when they come to the top, to which some never do under lasting
        load, and others not before the next request.
        """
        if self._queue and len(self._fresh) + len(self._ready) <= 2 * len(self._queue) + _SOME:
            return
        self._fresh = [seat for seat in self._fresh if seat.stage is Stage.QUEUED]
        self._ready = [seat for seat in self._ready if seat.stage is Stage.QUEUED]
        self._by_arrival = [(seat.rank[1], seat) for seat in self._ready]
        heaps: tuple[list[Any], ...] = (self._fresh, self._ready, self._by_arrival)
        for heap in heaps:
            heapq.heapify(heap)

    def unprepared(self) -> Seat[R] | None:
        """Whose prompt to look at next. It is given once."""
        with self._changed:
            while self._fresh:
                seat = heapq.heappop(self._fresh)
                if seat.stage is Stage.QUEUED:
                    return seat
        return None

    def prepared(self, seat: Seat[R]) -> None:
        """Its prompt has been looked at: it may have a place."""
        with self._changed:
            self._sweep()
            heapq.heappush(self._ready, seat)
            heapq.heappush(self._by_arrival, (seat.rank[1], seat))

    def first(self) -> Seat[R] | None:
        """Who gets the next place: by priority, then in the order of arrival."""
        with self._changed:
            while self._ready and self._ready[0].stage is not Stage.QUEUED:
                heapq.heappop(self._ready)
            while self._by_arrival and self._by_arrival[0][1].stage is not Stage.QUEUED:
                heapq.heappop(self._by_arrival)
            if not self._ready:
                return None
            oldest = self._taken % _FAIR == _FAIR - 1
            return self._by_arrival[0][1] if oldest else self._ready[0]

    def take(self, seat: Seat[R]) -> bool:
        """Give it a place; ``False`` if it has been withdrawn."""
        with self._changed:
            if seat.stage is not Stage.QUEUED:
                return False
            del self._queue[seat]
            seat.stage = Stage.RUNNING
            seat.started = time.perf_counter()
            self._running[seat.request.request_id] = seat
            self._taken += 1
        return True

    def refuse(self, seat: Seat[R], error: MLXEngineError) -> None:
        """It gets no place at all."""
        with self._changed:
            if seat.stage is not Stage.QUEUED:
                return
            del self._queue[seat]
            seat.stage = Stage.DONE
        seat.error = error
        seat.announce()

    def end(self, request: R, error: BaseException | None) -> None:
        """A request in the batch is over."""
        with self._changed:
            seat = self._running.pop(request.request_id, None)
            if seat is None:
                return  # told by end_all
            seat.ended = time.perf_counter()
            seat.stage = Stage.DONE
        if error is not None:
            seat.error = error
        else:
            seat.value = request.result()
        seat.announce()

    def end_all(self, error: MLXEngineError) -> None:
        """Nobody will do any of this any more."""
        with self._changed:
            waiting, running = list(self._queue), list(self._running.values())
        for seat in waiting:
            self.refuse(seat, _another(error))
        for seat in running:
            self.end(seat.request, _another(error))
        self.settle()

    def withdraw_orphans(self) -> None:
        """Drop those in the queue whose event loop is closed."""
        with self._changed:
            orphans = [seat for seat in self._queue if seat.orphaned]
        for seat in orphans:
            self._cancel(seat)


def _another(error: MLXEngineError) -> MLXEngineError:
    """The same error: to raise one object in many tasks would add all their frames to it."""
    another = copy.copy(error)
    another.__cause__ = error.__cause__
    return another
