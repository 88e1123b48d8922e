"""The queue of a batch: who gets the next place in it, and who is in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.ranked import FAIR, Ranked
from mlx_engine.core.work import PendingWork, Stage, ThreadJob
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import MLXEngineError, another
from mlx_engine.outputs import GenerationResult


class Schedulable(Protocol):
    """A request, as far as schedulers need to know it."""

    request_id: str
    priority: int

    @property
    def max_wait(self) -> float | None:
        """Seconds that it may wait for its turn, if its caller has a limit of his own."""

    def cancel(self) -> None:
        """Ask it to stop. From any thread."""

    def result(self) -> GenerationResult:
        """The result so far; final once it is over."""


R = TypeVar("R", bound=Schedulable)


class QueuedRequest(PendingWork[GenerationResult], Generic[R]):
    """A request on its way through the queue and the batch; its caller waits for it.

    Args:
        request: whose it is.
        on_done: called once it is over.
        on_moved: called, from any thread, when it may have a place or has left the queue.
    """

    def __init__(
        self,
        request: R,
        on_done: Callable[[PendingWork[Any]], None],
        on_moved: Callable[[], None],
    ) -> None:
        super().__init__(request.cancel, on_done, priority=request.priority)
        self.request = request
        self.on_moved = on_moved


class _Order(Generic[R]):
    """Requests in the queue in one order: those that may have a place, and those not ready yet."""

    def __init__(self, rank: Callable[[QueuedRequest[R]], tuple[int, ...]]) -> None:
        self._rank = rank
        self._ready: Ranked[QueuedRequest[R]] = Ranked()
        self._unready: Ranked[None] = Ranked()

    def add(self, queued: QueuedRequest[R]) -> None:
        if queued.ready:
            self._unready.discard(self._rank(queued))
            self._ready.add(self._rank(queued), queued)
        else:
            self._unready.add(self._rank(queued), None)

    def discard(self, queued: QueuedRequest[R]) -> None:
        self._ready.discard(self._rank(queued))
        self._unready.discard(self._rank(queued))

    def first(self, places: int) -> QueuedRequest[R] | None:
        """The first that is ready, unless those before it that are not will need all places."""
        queued = self._ready.first()
        if queued is None or self._unready.below(self._rank(queued), places) >= places:
            return None
        return queued

    def settled(self, places: int) -> bool:
        """Whether there are enough that are ready, or no others."""
        return len(self._ready) >= places or not self._unready


class BatchQueue(WorkQueue[QueuedRequest[R]], Generic[R]):
    """Requests that wait for a place in the batch, and those that have one.

    Entered and cancelled from event loops, made ready on other threads, taken up and ended on
    the MLX thread.

    Args:
        width: places in the batch.

    Attributes:
        job: the one in which the batch is worked on, or will be next.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.job: ThreadJob[None] | None = None
        self._running: dict[str, QueuedRequest[R]] = {}
        self._by_rank: _Order[R] = _Order(lambda queued: queued.rank)
        self._by_arrival: _Order[R] = _Order(lambda queued: queued.rank[1:])
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
        return mlx_thread.is_used_by_others(self.job)

    @property
    def pending(self) -> bool:
        """Whether there is anything to do on the MLX thread."""
        return bool(self._running) or self.first() is not None

    def first(self) -> QueuedRequest[R] | None:
        """Who gets the next place: by priority, then in the order of arrival.

        Nobody overtakes: who comes earlier and is not ready yet keeps a place. ``None`` if there
        is no place, or nobody for it.
        """
        with self._changed:
            if self.free <= 0:
                return None
            oldest = self._taken % FAIR == FAIR - 1
            return (self._by_arrival if oldest else self._by_rank).first(self.free)

    def gather(self, seconds: float) -> None:
        """Wait a moment for those that are not ready yet, so that they begin together."""
        with self._changed:
            self._changed.wait_for(lambda: self._by_rank.settled(self.free), seconds)

    def rest(self, seconds: float) -> None:
        """Wait a moment for those that may come, leave, or be ready meanwhile."""
        with self._changed:
            self._changed.wait(seconds)

    def turns(self) -> Iterator[QueuedRequest[R]]:
        """Yield those whose turn it is, each as long as it is neither taken nor withdrawn."""
        while (queued := self.first()) is not None:
            if queued.orphaned:
                self.withdraw_orphans()
            else:
                yield queued

    def take(self, queued: QueuedRequest[R]) -> bool:
        """Give it a place; ``False`` if it has been withdrawn."""
        with self._changed:
            if queued.stage is not Stage.QUEUED:
                return False
            self._withdraw(queued)
            queued.stage = Stage.RUNNING
            queued.started = time.perf_counter()
            self._running[queued.request.request_id] = queued
            self._taken += 1
        return True

    def end(self, request: R, error: BaseException | None) -> None:
        """A request in the batch is over."""
        with self._changed:
            queued = self._running.pop(request.request_id, None)
            if queued is None:
                return  # told by end_all
            queued.ended = time.perf_counter()
            queued.stage = Stage.DONE
        if error is not None:
            queued.error = error
        else:
            queued.value = request.result()
        queued.announce()

    def end_all(self, error: MLXEngineError) -> None:
        """Nobody will do any of this any more."""
        with self._changed:
            waiting, running = list(self._queue), list(self._running.values())
        for queued in waiting:
            self.refuse(queued, another(error))
        for queued in running:
            self.end(queued.request, another(error))

    def withdraw_orphans(self) -> None:
        """Drop those in the queue whose event loop is closed."""
        with self._changed:
            orphans = [queued for queued in self._queue if queued.orphaned]
        for queued in orphans:
            self._cancel(queued)

    def _enter(self, one: QueuedRequest[R]) -> None:
        mlx_thread.check_outside()
        with self._changed:
            if one.stage is Stage.QUEUED:  # else it was aborted on its way here
                self._queue[one] = None
                self._is_ready(one)

    def _is_ready(self, one: QueuedRequest[R]) -> None:
        self._by_rank.add(one)
        self._by_arrival.add(one)
        self._changed.notify_all()

    def _withdraw(self, one: PendingWork[Any]) -> None:
        super()._withdraw(one)
        assert isinstance(one, QueuedRequest)
        self._by_rank.discard(one)
        self._by_arrival.discard(one)
        self._changed.notify_all()

    def _moved(self, one: PendingWork[Any]) -> None:
        assert isinstance(one, QueuedRequest)
        one.on_moved()
