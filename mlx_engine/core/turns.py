"""Turns on the MLX thread, for work that is under way on another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted
from mlx_engine.core.work import ThreadJob
from mlx_engine.errors import drop_frames

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


def _without_frames(func: Callable[..., T], *args: Any) -> T:
    try:
        return func(*args)
    except BaseException as error:
        drop_frames(error)
        raise
