"""Work that is done beside requests: on a helper thread, without a turn on the MLX thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from mlx_engine.checks import LARGEST
from mlx_engine.core.stop import Interrupted, checkpoint, stoppable
from mlx_engine.core.work import PendingWork, Stage
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import MLXEngineError, describe, drop_frames, failed_by

T = TypeVar("T")

_BEHIND = LARGEST + 1  # the priorities of all requests


class SideWork(PendingWork[T]):
    """A function that a helper thread calls, and nothing else: it needs no MLX.

    The threads prepare requests first, and only one of them does such work at a time: many
    questions, or long ones, must not keep requests from their turns.

    Args:
        what: it does, for the error if it fails.
        func: looks at ``checkpoint`` between its steps.
        on_done: as for every ``PendingWork``.
    """

    def __init__(
        self, what: str, func: Callable[[], T], on_done: Callable[[PendingWork[Any]], None]
    ) -> None:
        super().__init__(on_done=on_done, priority=_BEHIND)
        self._what = what
        self._func: Callable[[], T] | None = func

    def do(self) -> MLXEngineError | None:
        """Call the function; the error that its caller gets, if it fails. On a helper thread."""
        func, self._func = self._func, None
        assert func is not None, "it is done once"
        try:
            with stoppable(lambda: self.cancelled or self.orphaned):
                checkpoint()
                self.started = time.perf_counter()
                self.value = func()
        except Interrupted:
            pass  # nobody wants it any more
        except MLXEngineError as error:
            drop_frames(error)
            return error
        except BaseException as error:  # noqa: BLE001 - the border: tokenizers raise anything
            drop_frames(error)
            return failed_by(error, f"{self._what} failed: {describe(error)}")
        finally:
            self.ended = time.perf_counter() if self.started else 0.0
        return None

    def announce(self) -> None:
        """Tell everyone that it is over. From any thread, once."""
        self._func = None  # what it holds should not outlive the work
        super().announce()


class SideQueue(WorkQueue[SideWork[Any]]):
    """Work whose preparation is all of it."""

    @property
    def busy(self) -> bool:
        """Never: there is no turn to wait for."""
        return False

    @property
    def free(self) -> int:
        """1: one is done at a time; of those in the queue, one is or will be next."""
        return 1

    def _enter(self, one: SideWork[Any]) -> None:
        with self._changed:
            if one.stage is Stage.QUEUED:  # else it was aborted on its way here
                self._queue[one] = None

    def _is_ready(self, one: SideWork[Any]) -> None:
        self._withdraw(one)
        one.stage = Stage.DONE

    def _moved(self, one: PendingWork[Any]) -> None:
        if one.ready:
            one.announce()
