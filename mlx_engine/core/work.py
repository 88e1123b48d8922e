"""Pieces of work that a coroutine waits for and another thread does."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mlx_engine.core.wakeup import running_loop, set_done, wake

T = TypeVar("T")


class Stage(enum.Enum):
    """How far a pending piece of work has come."""

    QUEUED = enum.auto()  # it may be withdrawn
    RUNNING = enum.auto()  # its work is being done: a job's function is on the MLX thread
    DONE = enum.auto()  # its work is over, or never will be done


_arrivals = itertools.count()


class PendingWork(Generic[T]):
    """Something that a coroutine waits for, and that another thread brings to its end.

    Made and awaited in a coroutine, used once. If it is not attended, nobody waits for it, and
    it may be made anywhere.

    Args:
        on_cancel: called at most once, from any thread, when the work should end early; it
            must not block (setting an event is what it is for).
        on_done: called once, from any thread, when it is over, whether or not its event loop
            still lives; it must not block either.
        attended: whether somebody in the running event loop waits for it.
        priority: lower goes first.

    Attributes:
        rank: its place in an order: by priority, then by arrival.
        stage: written by its queue alone, under the queue's lock.
        ready: whether it may be taken up; if not, a ``Preparer`` will say so. As ``stage``.
        preparing: whether it is on one of the ``Preparer``'s threads. As ``stage``.
        cancelled: whether it was cancelled or aborted before its work was over.
        value: what the work gave.
        error: what the work raised.
        aborted_with: the error that the caller gets instead of either.
        started, ended: when the work began and ended, by ``time.perf_counter``; 0 if it has
            not.
    """

    def __init__(
        self,
        on_cancel: Callable[[], None] | None = None,
        on_done: Callable[[PendingWork[Any]], None] | None = None,
        *,
        attended: bool = True,
        priority: int = 0,
    ) -> None:
        self._loop = running_loop() if attended else None
        self.rank = (priority, next(_arrivals))
        self._on_cancel = on_cancel
        self._on_done = on_done
        self._out: asyncio.Future[None] | None = self._loop.create_future() if self._loop else None
        self.stage = Stage.QUEUED
        self.ready = True
        self.preparing = False
        self.cancelled = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self.aborted_with: BaseException | None = None
        self.started = self.ended = 0.0

    @property
    def out(self) -> asyncio.Future[None]:
        """Done when it is over; carries no outcome, so that none goes unretrieved."""
        assert self._out is not None, "nobody waits for what is not attended"
        return self._out

    @property
    def waiting(self) -> bool:
        """Whether its work has not been taken up yet."""
        return self.stage is Stage.QUEUED

    @property
    def running(self) -> bool:
        """Whether its work is being done now."""
        return self.stage is Stage.RUNNING

    @property
    def attended(self) -> bool:
        """Whether it was made for somebody who waits."""
        return self._loop is not None

    @property
    def orphaned(self) -> bool:
        """Whether its event loop is closed, so that nobody waits for it any more."""
        return self._loop is not None and self._loop.is_closed()

    def take_on_cancel(self) -> Callable[[], None] | None:
        """The callback, the first time."""
        on_cancel, self._on_cancel = self._on_cancel, None
        return on_cancel

    def call_back(self, func: Callable[[], None], name: str) -> None:
        """Call a callback; its failure is reported, and costs neither drain nor lock."""
        try:
            func()
        except BaseException as error:  # noqa: BLE001 - foreign code, called by the one thread
            if self._loop is None:
                sys.excepthook(*sys.exc_info())
                return
            self._loop.call_exception_handler(
                {"message": f"{name} raised, the engine goes on", "exception": error}
            )

    def announce(self) -> None:
        """Tell everyone that it is over. From any thread, once."""
        self._on_cancel = None  # what it holds should not outlive the work
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            self.call_back(functools.partial(on_done, self), "on_done")
        if self.cancelled:  # nobody gets them; they are dropped here rather than elsewhere
            self.value = self.error = None
        if not self.attended:
            return
        if asyncio._get_running_loop() is self._loop:
            set_done(self.out)
        else:
            wake(self.out)

    def outcome(self) -> T:
        """Return or raise what the caller gets."""
        error = self.aborted_with or self.error
        value, self.value = self.value, None
        if error is None:
            return value  # type: ignore[return-value]
        self.error = self.aborted_with = None
        try:
            raise error
        finally:
            del error  # no cycle from the traceback to this frame


class ThreadJob(PendingWork[T]):
    """One function that another thread calls: the MLX thread, as a rule.

    Args:
        func: called without arguments, with the context variables of the caller.
        on_cancel: called at most once, from any thread, when the function should return
            early.
        on_done: called once, from any thread, when the job is over.
        attended: whether somebody in the running event loop waits for it; if not, the function
            is called with no context variables.
        lane: jobs of one lane go in their order, whether or not the first of them is ready;
            ``None`` is for those that always are.

    Attributes:
        is_slice: whether it is a part of work that somebody waits for. After one of a lane
            another lane has its turn, if it wants one.
    """

    is_slice = False

    def __init__(
        self,
        func: Callable[[], T],
        on_cancel: Callable[[], None] | None = None,
        on_done: Callable[[PendingWork[Any]], None] | None = None,
        *,
        attended: bool = True,
        lane: object = None,
    ) -> None:
        super().__init__(on_cancel, on_done, attended=attended)
        self.lane = lane
        self._context: contextvars.Context | None = (
            contextvars.copy_context() if attended else contextvars.Context()
        )
        self._func: Callable[[], T] | None = func

    def execute(self) -> None:
        """On the other thread: call the function and keep its outcome."""
        func, self._func = self._func, None
        # Not kept: it will hold this job, and only the garbage collector would end that.
        context, self._context = self._context, None
        self.started = time.perf_counter()
        try:
            if func is None or context is None:
                raise RuntimeError("a job is used once")
            self.value = context.run(_call_in_job, self, func)
        except BaseException as error:  # noqa: BLE001 - the border: the caller raises it
            self.error = error
        self.ended = time.perf_counter()

    def goes_on(self) -> bool:
        """Whether it is not over when its function has returned, but goes on elsewhere."""
        return False

    def announce(self) -> None:
        """Tell everyone that it is over. From any thread, once."""
        self._func = None  # what it holds should not outlive the job
        super().announce()


def call_in(context: contextvars.Context, func: Callable[..., T], /, *args: Any) -> T:
    """Call ``func`` with other context variables, as part of the job that runs."""
    return context.run(_call_in_job, _current.get(), func, *args)


def _call_in_job(job: ThreadJob[Any] | None, func: Callable[..., T], *args: Any) -> T:
    _current.set(job)
    return func(*args)


def current_job() -> ThreadJob[Any] | None:
    """The job in whose function, or in whose context variables, the caller runs."""
    return _current.get()


_current: contextvars.ContextVar[ThreadJob[Any] | None] = contextvars.ContextVar(
    "_current", default=None
)
