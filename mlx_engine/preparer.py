"""Threads that prepare pending work before its turn: prompts are tokenized there, without MLX."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from mlx_engine.errors import EngineDead, GenerationError, MLXEngineError
from mlx_engine.line import Line
from mlx_engine.ranked import Ranked
from mlx_engine.threads import Start
from mlx_engine.turn import Pending

P = TypeVar("P", bound=Pending[Any])

_THREADS = 2  # so that one long prompt does not keep all others waiting


class Preparer(Generic[P]):
    """Prepares the pending work of an engine, in the order of its ranks, a few pieces at once.

    A thread begins when there is something to do, and ends when there is nothing. What it does
    must need no MLX, and should look at ``checkpoint`` between its steps.

    Args:
        line: where the work is queued.
    """

    def __init__(self, line: Line[P]) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._waiting: Ranked[Preparing[P]] = Ranked()
        self._threads = 0

    def add(self, work: Preparing[P]) -> None:
        """Have it done. From any thread."""
        with self._lock:
            self._waiting.add(work.one.rank, work)
            if self._threads >= _THREADS:
                return
            self._threads += 1
        start = Start(self._run, "prepare", partial(self._fail, work))
        try:
            start.begin()
        except EngineDead as error:
            self._fail(work, error)

    def discard(self, work: Preparing[P]) -> None:
        """Nobody wants it any more; nothing happens if a thread has it. From any thread."""
        with self._lock:
            self._waiting.discard(work.one.rank)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            self._do(work)
            del work  # or what it holds would live until the next one

    def _next(self) -> Preparing[P] | None:
        with self._lock:
            work = self._waiting.pop()
            if work is None:
                self._threads -= 1
            return work

    def _do(self, work: Preparing[P]) -> None:
        if not self._line.take_to_prepare(work.one):
            return
        error: BaseException | None = None
        try:
            error = work.func()
        except BaseException as raised:  # noqa: BLE001 - the border: its caller raises it
            error = raised
        self._line.left(work.one, error)

    def _fail(self, work: Preparing[P], error: EngineDead) -> None:
        """There is no thread for it, unless another one still runs."""
        with self._lock:
            self._threads -= 1
            if self._threads:
                return
        failed = GenerationError(f"the prompt is not prepared: {error}")
        failed.__cause__ = error
        if self._line.take_to_prepare(work.one):
            self._line.left(work.one, failed)


class Preparing(Generic[P]):
    """One piece of pending work and what is to be done for it before its turn.

    Args:
        preparer: does it.
        one: the work, which is not ready before.
        func: called once at most, on a thread of the preparer; what it returns is the error
            that the caller of the work gets.
    """

    def __init__(
        self, preparer: Preparer[P], one: P, func: Callable[[], MLXEngineError | None]
    ) -> None:
        self.one = one
        self.func = func
        self._preparer = preparer

    def begin(self) -> None:
        """See ``Preparation``."""
        self._preparer.add(self)

    def forget(self) -> None:
        """See ``Preparation``."""
        self._preparer.discard(self)
