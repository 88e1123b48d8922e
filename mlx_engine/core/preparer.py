"""Threads that prepare pending work before its turn: prompts are tokenized there, without MLX."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mlx_engine.core.ranked import FAIR, Ranked
from mlx_engine.core.threads import Start, StartLimit
from mlx_engine.core.work import PendingWork
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import EngineDead, GenerationError, MLXEngineError

P = TypeVar("P", bound=PendingWork[Any])

Limit = tuple[Start, StartLimit]

_THREADS = 2  # so that one long prompt does not keep all others waiting
_LINGER = 1.0  # seconds that a thread waits for more to do: to start one takes longer than a prompt


class Preparer(Generic[P]):
    """Prepares the pending work of an engine, in the order of its ranks, a few pieces at once.

    Every eighth piece is the one that came first, whatever the ranks: it may be the one that gets
    the next place, and all others would wait for it.

    Of work that waits elsewhere only one piece is done at a time, after all that may be done
    first: there is always another thread for what waits in the queue.

    A thread begins when there is something to do, and ends when there is nothing for a moment. It
    holds no engine and no model meanwhile. What it does must need no MLX, and should look at
    ``checkpoint`` between its steps.

    Args:
        queue: where the work waits, if not elsewhere.

    Attributes:
        queue: the same.
    """

    def __init__(self, queue: WorkQueue[P]) -> None:
        self.queue = queue
        # Reentrant: a coroutine may be destroyed anywhere, and leaves then.
        self._changed = threading.Condition(threading.RLock())
        self._by_rank: Ranked[Preparing[P]] = Ranked()
        self._by_arrival: Ranked[Preparing[P]] = Ranked()
        self._elsewhere: Ranked[Preparing[P]] = Ranked()  # in the order of arrival
        self._one_elsewhere = False  # whether a thread has one of those
        self._taken = 0
        self._threads = 0  # that run, or are on their way
        self._idle = 0  # of them, that wait for something to do

    def add(self, work: Preparing[P]) -> Limit | None:
        """Have it done. In the event loop of its caller.

        Returns:
            What gives up the thread that was started for it, if one was.
        """
        with self._changed:
            if self._is_elsewhere(work):
                self._elsewhere.add(work.one.rank[1:], work)
                if self._one_elsewhere:
                    return None  # the thread that has that one looks for the next
            else:
                self._by_rank.add(work.one.rank, work)
                self._by_arrival.add(work.one.rank[1:], work)
            if self._idle:
                self._idle -= 1
                self._changed.notify()
                return None
            if self._threads >= _THREADS:
                return None
            self._threads += 1
        start = Start(self._run, "prepare", self._fail)
        try:
            start.begin()
        except EngineDead as error:
            self._fail(error)
            return None
        return start, start.limit()

    def discard(self, work: Preparing[P]) -> None:
        """Nobody wants it any more; nothing happens if a thread has it. From any thread."""
        with self._changed:
            self._leave(work)

    def _is_elsewhere(self, work: Preparing[P]) -> bool:
        return work.queue is not self.queue

    def _leave(self, work: Preparing[P]) -> None:
        self._by_rank.discard(work.one.rank)
        for order in (self._by_arrival, self._elsewhere):
            order.discard(work.one.rank[1:])

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                self._do(work)
            finally:
                if self._is_elsewhere(work):
                    with self._changed:
                        self._one_elsewhere = False
            del work  # or what it holds would live until the next one

    def _next(self) -> Preparing[P] | None:
        with self._changed:
            while (work := self._first()) is None:
                if not self._more_comes():
                    self._threads -= 1
                    return None
            self._taken += 1
            self._leave(work)
            if self._is_elsewhere(work):
                self._one_elsewhere = True
            return work

    def _first(self) -> Preparing[P] | None:
        oldest = self._taken % FAIR == FAIR - 1
        here = (self._by_arrival if oldest else self._by_rank).first()
        there = None if self._one_elsewhere else self._elsewhere.first()
        if here is None or there is None:
            return here or there
        return there if oldest and there.one.rank[1:] < here.one.rank[1:] else here

    def _more_comes(self) -> bool:
        """Wait for something to do; whether there may be something. Under the lock."""
        self._idle += 1
        if self._changed.wait(_LINGER):
            return True
        if self._idle:
            self._idle -= 1
            return False
        return True  # it was called in the last moment

    def _do(self, work: Preparing[P]) -> None:
        if not work.queue.take_to_prepare(work.one):
            return
        error: BaseException | None = None
        try:
            error = work.func()
        except BaseException as raised:  # noqa: BLE001 - the border: its caller raises it
            error = raised
        work.queue.left(work.one, error)

    def _fail(self, error: EngineDead) -> None:
        """A thread does not come. Another one does what there is; if there is none, nobody does."""
        with self._changed:
            self._threads -= 1
            if self._threads:
                return
            left: list[Preparing[P]] = []
            while (work := self._by_rank.first() or self._elsewhere.first()) is not None:
                self._leave(work)
                left.append(work)
        for work in left:
            failed = GenerationError(f"the prompt is not prepared: {error}")
            failed.__cause__ = error
            if work.queue.take_to_prepare(work.one):
                work.queue.left(work.one, failed)


class Preparing(Generic[P]):
    """One piece of pending work and what is to be done for it before its turn.

    Args:
        preparer: does it.
        one: the work, which is not ready before.
        func: called once at most, on a thread of the preparer; what it returns is the error
            that the caller of the work gets.
        queue: where the work waits; that of the preparer if there is none. Of work in others
            one piece is done at a time.
    """

    def __init__(
        self,
        preparer: Preparer[P],
        one: P,
        func: Callable[[], MLXEngineError | None],
        queue: WorkQueue[P] | None = None,
    ) -> None:
        self.one = one
        self.queue = queue or preparer.queue
        self.func = func
        self._preparer = preparer
        self._limit: Limit | None = None

    def begin(self) -> None:
        """See ``Preparation``."""
        self._limit = self._preparer.add(self)

    def over(self) -> None:
        """See ``Preparation``."""
        if self._limit is not None:
            start, timer = self._limit
            if not start.pending:  # others may wait for that thread
                timer.cancel()

    def forget(self) -> None:
        """See ``Preparation``."""
        self._preparer.discard(self)
