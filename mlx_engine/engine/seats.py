"""The queue of a batch: who gets the next place in it, and who is in it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from mlx_engine.errors import MLXEngineError
from mlx_engine.generation.request import Request
from mlx_engine.line import Line
from mlx_engine.outputs import GenerationResult
from mlx_engine.turn import Pending, Stage
from mlx_engine.worker import mlx_thread

_FAIR = 8  # every eighth place goes to whoever has waited longest, whatever the priorities
_arrivals = itertools.count()


class Seat(Pending[GenerationResult]):
    """A request on its way through the queue and the batch.

    Args:
        request: whose it is.
        on_done: called once it is over.
        on_enter: called when it is in the queue, in its event loop.

    Attributes:
        ready: whether the request has been prepared.
    """

    def __init__(
        self,
        request: Request,
        on_done: Callable[[Pending[Any]], None],
        on_enter: Callable[[], None],
    ) -> None:
        super().__init__(request.cancel, on_done)
        self.request = request
        self.on_enter = on_enter
        self.ready = False
        self.rank = (request.priority, next(_arrivals))

    @property
    def arrival(self) -> int:
        """Seats that came before it, of all engines."""
        return self.rank[1]


class Seats(Line[Seat]):
    """Requests that wait for a place in the batch, and those that have one.

    Entered and cancelled from event loops; taken up and ended on the MLX thread.

    Args:
        width: places in the batch.

    Attributes:
        bursting: whether the MLX thread works on this batch now.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.bursting = False
        self._running: dict[str, Seat] = {}
        self._taken = 0

    @property
    def free(self) -> int:
        """Places in the batch that nobody has."""
        return self.width - len(self._running)

    @property
    def busy(self) -> bool:
        """Whether a request that enters now would have to wait for others to finish."""
        with self._changed:
            if len(self._queue) >= self.free:
                return True
        return mlx_thread.busy and not self.bursting

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._queue or self._running)

    def all(self) -> list[Seat]:
        """Those that wait and those in the batch."""
        with self._changed:
            return [*self._queue, *self._running.values()]

    def _enter(self, one: Seat) -> None:
        mlx_thread.check_outside()
        with self._changed:
            if one.stage is Stage.QUEUED:  # else it was aborted on its way here
                self._queue.append(one)
        one.on_enter()

    def unprepared(self) -> Seat | None:
        """Whose prompt to look at next."""
        with self._changed:
            fresh = [seat for seat in self._queue if not seat.ready]
        return min(fresh, key=lambda seat: seat.rank, default=None)

    def first(self) -> Seat | None:
        """Who gets the next place: by priority, then in the order of arrival."""
        with self._changed:
            ready = [seat for seat in self._queue if seat.ready]
        if self._taken % _FAIR == _FAIR - 1:
            return min(ready, key=lambda seat: seat.arrival, default=None)
        return min(ready, key=lambda seat: seat.rank, default=None)

    def take(self, seat: Seat) -> bool:
        """Give it a place; ``False`` if it has been withdrawn."""
        with self._changed:
            if seat.stage is not Stage.QUEUED:
                return False
            self._queue.remove(seat)
            seat.stage = Stage.RUNNING
            seat.started = time.perf_counter()
            self._running[seat.request.request_id] = seat
            self._taken += 1
        return True

    def end(self, request: Request, error: BaseException | None) -> None:
        """A request is over, in the batch or before it came there."""
        with self._changed:
            seat = self._running.pop(request.request_id, None)
            if seat is None:
                waiting = [seat for seat in self._queue if seat.request is request]
                if not waiting:
                    return  # withdrawn meanwhile
                seat = waiting[0]
                self._queue.remove(seat)
            else:
                seat.ended = time.perf_counter()
            seat.stage = Stage.DONE
        if error is not None:
            seat.error = error
        else:
            seat.value = request.result()
        seat.announce()

    def end_all(self, error: MLXEngineError) -> None:
        """Nobody will do any of this any more."""
        for seat in self.all():
            self.end(seat.request, error)

    def withdraw_orphans(self) -> None:
        """Drop those in the queue whose event loop is closed."""
        for seat in self.all():
            if seat.orphaned and seat.waiting:
                self._cancel(seat)
