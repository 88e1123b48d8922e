"""Work in flight in a manager: its caller may cancel it, and a shutdown may abort it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from mlx_engine.core.drain import wait_shielded
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle
from mlx_engine.core.wakeup import running_loop, wake
from mlx_engine.errors import MLXEngineError
from mlx_engine.remote.replicas.tasks import cancel, look_at

T = TypeVar("T")


class AbortableWork:
    """An entry in flight, as a context manager, and the work that its holder waits for.

    Cancelled, the holder waits until its work is over, as everywhere. An abort does not wait:
    the work is cancelled, and is left to whoever stops what it runs on. So a replica that is
    stuck holds up no shutdown.

    Args:
        request_id: its name.
        lifecycle: what it is in flight in.
        leftovers: gets the tasks that an abort has left; they leave it when they are over.
        reported: whether a shutdown reports on it; see ``InFlight``.
    """

    def __init__(
        self,
        request_id: str,
        lifecycle: Lifecycle,
        leftovers: set[asyncio.Task[Any]],
        *,
        reported: bool = True,
    ) -> None:
        self._entry = InFlight(request_id, loop=running_loop(), reported=reported)
        self._lifecycle = lifecycle
        self._leftovers = leftovers
        self._lock = threading.Lock()
        self._error: MLXEngineError | None = None
        self._work_over: asyncio.Future[None] | None = None
        self._ended = False

    def __enter__(self) -> AbortableWork:
        self._entry.abort = self._abort
        self._lifecycle.admit(self._entry)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._ended = True
        self._lifecycle.in_flight.remove(self._entry)
        if exc_type is None and self._error is not None:  # it is reported as aborted, so it is
            raise self._error

    @property
    def aborted(self) -> bool:
        """True if a shutdown has ended it. From any thread."""
        return self._error is not None

    @property
    def over(self) -> bool:
        """True if nobody waits for it any more. From any thread."""
        return self._ended or self.aborted

    async def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``.

        Cancellation: the work is cancelled, ``CancelledError`` is raised when it is over.

        Raises:
            EngineStopped: it was aborted; the work may go on for a while.
            BaseException: whatever the work raises.
        """
        loop = running_loop()
        task = loop.create_task(work, name=f"{self._entry.request_id} work")
        over: asyncio.Future[None] = loop.create_future()
        task.add_done_callback(lambda _: wake(over))
        with self._lock:
            self._work_over = over
            if self._error is not None:
                wake(over)
        try:
            await wait_shielded(over, lambda: cancel(task))
        finally:
            self._work_over = None
            if task.done():
                look_at(task)
            else:
                task.add_done_callback(look_at)
                task.add_done_callback(self._leftovers.discard)
                self._leftovers.add(task)
                cancel(task)
        if self._error is not None:
            raise self._error
        return task.result()

    def _abort(self, error: MLXEngineError) -> bool:
        """End it with ``error``, unless it has. From any thread; never waits."""
        with self._lock:
            if self._ended:
                return False
            self._error = error
            if self._work_over is not None:
                wake(self._work_over)
            return True
