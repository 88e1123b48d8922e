"""Work in slices: it begins on the MLX thread, and goes on beside it, taking turns there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted, stoppable
from mlx_engine.core.threads import Start
from mlx_engine.core.turns import Turns
from mlx_engine.core.wakeup import running_loop
from mlx_engine.core.work import PendingWork, Stage, ThreadJob
from mlx_engine.errors import EngineDead

T = TypeVar("T")


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
