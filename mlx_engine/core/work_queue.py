"""Lines: pending work in order, and the one way of waiting in them and being cancelled."""

from __future__ import annotations

import abc
import threading
from collections import OrderedDict
from typing import Any, Generic, Protocol, TypeVar

from mlx_engine.core.drain import wait_shielded
from mlx_engine.core.work import PendingWork, Stage

T = TypeVar("T")
P = TypeVar("P", bound=PendingWork[Any])


class Preparation(Protocol):
    """Preparation of a piece of pending work, before which it is not taken up."""

    def begin(self) -> None:
        """See to it that it is done, on another thread, which then calls ``WorkQueue.left``."""

    def forget(self) -> None:
        """Nobody wants it any more. Called under the queue's lock."""

    def over(self) -> None:
        """Whoever wanted it waits no more. In the event loop of ``begin``."""


class WorkQueue(abc.ABC, Generic[P]):
    """Pending work in order of arrival. Its owner, on a thread, takes it up and ends it.

          enter          taken up            over
    caller ─────► QUEUED ────────► RUNNING ───────► DONE ──► caller
                    │ withdrawn when cancelled        ▲
                    └─────────────────────────────────┘

    Work that needs a preparation is taken up once that is done. If it is being prepared when it
    is cancelled, its caller is told when the thread that prepares it has left it.
    """

    width = 1  # how many can be in work at once

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: OrderedDict[P, None] = OrderedDict()  # to be left anywhere
        self._preparations: dict[P, Preparation] = {}  # of those that are not ready

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

    def waiting_with(self, one: P) -> int:
        """How many of the same engine are queued, ``one`` included."""
        return len(self._queue)

    async def run(self, one: P, preparation: Preparation | None = None) -> Any:
        """Enter, wait until it is over, and return what it gave.

        Cancellation: what waits is withdrawn at once. For what is in work, ``on_cancel`` is
        called, and the caller stays until it is over, however often it is cancelled; the
        outcome is then discarded and the first ``CancelledError`` raised. So does the caller of
        what is being prepared, until that is over.

        Raises:
            RuntimeError: called from inside a job on the MLX thread that is still running,
                which would wait for itself for ever.
            EngineDead: there is nobody left to do it.
            BaseException: whatever the work or its preparation raised, or ``abort`` was given.
        """
        try:
            if preparation is not None:
                one.ready = False
                self._preparations[one] = preparation
            self._enter(one)
            if preparation is not None:
                preparation.begin()
        except BaseException as error:
            one.error = error
            self._cancel(one)
            raise
        try:
            await wait_shielded(one.out, lambda: self._cancel(one))
        finally:
            if not one.out.done():  # the coroutine is being destroyed, its loop is gone
                self._cancel(one)
            elif preparation is not None:
                preparation.over()
        return one.outcome()

    def abort(self, one: PendingWork[Any], error: BaseException) -> bool:
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

    def expire(self, one: PendingWork[Any], error: BaseException) -> bool:
        """Like ``abort``, but only if it still waits; whether it did."""
        with self._changed:
            if one.stage is not Stage.QUEUED:
                return False
            one.aborted_with = error
        self._cancel(one)
        return True

    def refuse(self, one: P, error: BaseException) -> None:
        """Refuse to do it: its caller gets ``error``. From any thread."""
        with self._changed:
            if one.stage is not Stage.QUEUED:
                return
            one.error = error
            self._withdraw(one)
            if one.preparing:
                return  # told when that is over
            one.stage = Stage.DONE
        one.announce()

    def take_to_prepare(self, one: P) -> bool:
        """Begin with its preparation; ``False`` if nobody wants it any more."""
        with self._changed:
            if self._preparations.pop(one, None) is None:
                return False
            one.preparing = True
            return True

    def left(self, one: P, error: BaseException | None) -> None:
        """Note that its preparation is over, and has failed if there is an ``error``."""
        with self._changed:
            one.preparing = False
            one.error = one.error or error
            one.ready = not one.cancelled and one.error is None
            if one.ready:
                self._is_ready(one)
            else:
                self._withdraw(one)
                one.stage = Stage.DONE
        if not one.ready:
            one.announce()
        self._moved(one)

    @abc.abstractmethod
    def _enter(self, one: P) -> None:
        """Put it in the queue, and see to it that it is taken up."""

    def _is_ready(self, one: P) -> None:
        """Let it be taken up. Under the lock."""

    def _moved(self, one: PendingWork[Any]) -> None:
        """Look for who may go: it has become ready, or has left the queue. From any thread."""

    def _withdraw(self, one: PendingWork[Any]) -> None:
        """Take it out of the queue. Under the lock; it may be out of it already."""
        self._queue.pop(one, None)  # type: ignore[arg-type]
        preparation = self._preparations.pop(one, None)  # type: ignore[arg-type]
        if preparation is not None:
            preparation.forget()

    def _cancel(self, one: PendingWork[Any]) -> None:
        """Withdraw what waits; ask what is in work to stop."""
        with self._changed:
            if one.stage is Stage.DONE:
                return
            one.cancelled = True
            on_cancel = one.take_on_cancel()
            queued = one.stage is Stage.QUEUED
            withdrawn = queued and not one.preparing
            if queued:
                self._withdraw(one)
            if withdrawn:
                one.stage = Stage.DONE
        if withdrawn:
            one.announce()
        elif on_cancel is not None:
            one.call_back(on_cancel, "on_cancel")
        if queued:
            self._moved(one)
