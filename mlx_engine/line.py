"""Lines: pending work in order, and the one way of waiting in them and being cancelled."""

from __future__ import annotations

import abc
import threading
from collections import OrderedDict
from typing import Any, Generic, TypeVar

from mlx_engine.turn import Pending, Stage, outlast

T = TypeVar("T")
P = TypeVar("P", bound=Pending[Any])


class Line(abc.ABC, Generic[P]):
    """Pending work in order of arrival. Its owner, on a thread, takes it up and ends it.

          enter          taken up            over
    caller ─────► QUEUED ────────► RUNNING ───────► DONE ──► caller
                    │ withdrawn when cancelled        ▲
                    └─────────────────────────────────┘
    """

    width = 1  # how many can be in work at once

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: OrderedDict[P, None] = OrderedDict()  # to be left anywhere

    @property
    @abc.abstractmethod
    def busy(self) -> bool:
        """Whether work that enters now would have to wait."""

    @property
    @abc.abstractmethod
    def free(self) -> int:
        """How many of those in the queue are about to be taken up."""

    @property
    def waiting(self) -> int:
        """How many are queued."""
        return len(self._queue)

    async def run(self, one: P) -> Any:
        """Enter, wait until it is over, and return what it gave.

        Cancellation: what waits is withdrawn at once. For what is in work, ``on_cancel`` is
        called, and the caller stays until it is over, however often it is cancelled; the
        outcome is then discarded and the first ``CancelledError`` raised.

        Raises:
            RuntimeError: called from inside a turn on the MLX thread that is still running,
                which would wait for itself for ever.
            EngineDead: there is nobody left to do it.
            BaseException: whatever the work raised, or ``abort`` was given.
        """
        try:
            self._enter(one)
        except BaseException as error:
            one.error = error
            self._cancel(one)
            raise
        try:
            await outlast(one.out, lambda: self._cancel(one))
        finally:
            if not one.out.done():  # the coroutine is being destroyed, its loop is gone
                self._cancel(one)
        return one.outcome()

    def abort(self, one: Pending[Any], error: BaseException) -> bool:
        """End it so that its caller gets ``error``; ``False`` if it was over already.

        If it is in work it is asked to stop, and the caller told once it is over. From any
        thread.
        """
        with self._changed:
            if one.stage is Stage.DONE:
                return False
            one.aborted_with = error
        self._cancel(one)
        return True

    def expire(self, one: Pending[Any], error: BaseException) -> bool:
        """Like ``abort``, but only if it still waits; whether it did."""
        with self._changed:
            if one.stage is not Stage.QUEUED:
                return False
            one.aborted_with = error
        self._cancel(one)
        return True

    @abc.abstractmethod
    def _enter(self, one: P) -> None:
        """Put it in the queue, and see to it that it is taken up."""

    def _cancel(self, one: Pending[Any]) -> None:
        """Withdraw what waits; ask what is in work to stop."""
        with self._changed:
            if one.stage is Stage.DONE:
                return
            one.cancelled = True
            on_cancel = one.take_on_cancel()
            withdrawn = one.stage is Stage.QUEUED
            if withdrawn:
                self._queue.pop(one, None)  # type: ignore[arg-type]
                one.stage = Stage.DONE
        if withdrawn:
            one.announce()
        elif on_cancel is not None:
            one.call_back(on_cancel, "on_cancel")
