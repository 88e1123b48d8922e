"""Work in slices: it takes turns on the MLX thread, and goes on beside it between them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted, stoppable
from mlx_engine.core.threads import Start
from mlx_engine.core.wakeup import running_loop
from mlx_engine.core.work import PendingWork, Stage, ThreadJob
from mlx_engine.errors import EngineDead, drop_frames

T = TypeVar("T")


class _Turn(ThreadJob[T]):
    """A slice of work, which has the place in the queue that the whole of it had."""

    is_slice = True

    def __init__(self, func: Callable[[], T], lane: object, rank: tuple[int, int]) -> None:
        super().__init__(func, attended=False, lane=lane)
        self.rank = rank


class Turns:
    """Turns on the MLX thread, for work that is done on another thread.

    They come soon: after each, whoever else waits has a turn, and then the next of these.

    Args:
        loop: in which somebody waits for the work.

    Attributes:
        rank: of the work.
    """

    rank = (0, 0)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._stopped = False
        self._turn: _Turn[Any] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the work should end: it was cancelled, or nobody is left to be told."""
        return self._stopped or self._loop.is_closed()

    def take(self, func: Callable[..., T], /, *args: Any) -> T:
        """Call ``func`` on the MLX thread when there is a turn, and wait for that.

        What it gives, and what an error of it holds, must be no arrays: they end on this thread.

        Raises:
            Interrupted: the work should end; ``func`` is not called then, or was the last.
            EngineDead: there is no MLX thread any more.
            BaseException: what ``func`` raises, without its frames.
        """
        turn: _Turn[T] = _Turn(partial(_without_frames, func, *args), self, self.rank)
        with self._lock:
            if self.stopped:
                raise Interrupted
            self._turn = turn
        try:
            return mlx_thread.call(turn)
        finally:
            self._turn = None

    def drop(self, func: Callable[[], None]) -> None:
        """Have ``func`` drop, on the MLX thread and soon, what must not be dropped elsewhere."""
        mlx_thread.post(func)

    def stop(self) -> None:
        """Have the work end soon; a turn that it waits for, it gets no more. From any thread."""
        with self._lock:
            self._stopped = True
            turn = self._turn
        if turn is not None:
            mlx_thread.abort(turn, Interrupted())


Rest = Callable[[Turns], T]


class SlicedJob(ThreadJob[T]):
    """Work that begins on the MLX thread, and does the rest on a thread of its own.

    It is one piece of work for whoever waits: queued until it begins, and running until the rest
    is over, though it is on the MLX thread only for its beginning and for the turns that it takes.

    Args:
        begin: called on the MLX thread; gives the rest, which should look at ``checkpoint``
            between its steps, and holds nothing that must end on that thread.
        on_done, lane: as for every ``ThreadJob``.
    """

    def __init__(
        self,
        begin: Callable[[], Rest[T]],
        on_done: Callable[[PendingWork[Any]], None] | None = None,
        *,
        lane: object = None,
    ) -> None:
        self._turns = Turns(running_loop())
        super().__init__(begin, self._turns.stop, on_done, lane=lane)  # type: ignore[arg-type]
        self._turns.rank = self.rank
        self._begun = self._helpless = False

    def goes_on(self) -> bool:
        """Whether the rest is to be done. Called when it has begun, under the thread's lock."""
        self._begun = self.error is None and not self.cancelled and not self._helpless
        if not self._begun:
            self.value = None
        return self._begun

    @contextmanager
    def on_thread(self, name: str) -> Iterator[None]:
        """Have a thread for the rest. In the event loop, around all the time that it is waited for.

        If none can be had for 10 s, whoever waits gets ``EngineDead``.
        """
        # No daemon: an interpreter that exits does not leave half a file behind.
        start = Start(self._do_rest, name, self._without_thread, daemon=False)
        limit = start.limit()
        try:
            try:
                start.begin()
            except EngineDead as error:
                self._without_thread(error)
            yield
        finally:
            limit.cancel()
            start.give_up()

    def _do_rest(self) -> None:
        mlx_thread.wait_for(lambda: self._begun or self.stage is Stage.DONE)
        if not self._begun:
            return
        rest: Any = self.value
        self.value = None
        try:
            with stoppable(lambda: self._turns.stopped):
                self.value = rest(self._turns)
        except BaseException as error:  # noqa: BLE001 - the border: the caller raises it
            self.error = error
            self.cancelled = self.cancelled or isinstance(error, Interrupted)
        del rest
        self.ended = time.perf_counter()
        mlx_thread.end(self)

    def _without_thread(self, error: EngineDead) -> None:
        self._helpless = True
        mlx_thread.abort(self, error)
        mlx_thread.end(self)


def _without_frames(func: Callable[..., T], *args: Any) -> T:
    try:
        return func(*args)
    except BaseException as error:
        drop_frames(error)
        raise
