"""Requests that share the MLX thread in bursts."""

from __future__ import annotations

import abc
import functools
import threading
from typing import Generic

from mlx_engine.core.in_flight import RequestTicket
from mlx_engine.core.preparer import Preparing
from mlx_engine.core.scheduler import BatchScheduler, QueuedRequest, R
from mlx_engine.core.work import PendingWork
from mlx_engine.engine.life import EngineLife
from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import GenerationResult


class BurstLife(EngineLife, Generic[R]):
    """The life of an engine that works on many requests at once, in bursts.

    A burst is one turn on the MLX thread. It is for its heirs to say what is done in one.
    """

    _seats: BatchScheduler[R]

    async def _serve(self, request: R, ticket: RequestTicket) -> GenerationResult:
        seat = QueuedRequest(request, functools.partial(self._admission.over, ticket), self._drive)
        preparing = Preparing(self._preparer, seat, functools.partial(self._prepare, request))
        with self._admission.enter(ticket, seat, self._seats):
            return await self._seats.run(seat, preparing)  # type: ignore[no-any-return]

    def _drive(self) -> None:
        """See to it that a burst is under way, or in the queue of the MLX thread, if needed.

        Nobody waits for a burst: if an event loop had to ask for the next one, all requests
        would depend on that loop. From any thread.
        """
        with self._seats.driving:
            if self._seats.burst is not None or not self._seats.pending:
                return
            try:
                self._seats.burst = self._run_unattended(self._burst, self._burst_over)
                return
            except MLXEngineError as error:
                gone = error
        self._seats.end_all(gone)

    def _burst_over(self, turn: PendingWork[None]) -> None:
        """It has made way for others, or there was nothing left to do."""
        with self._seats.driving:
            self._seats.burst = None
        if isinstance(turn.aborted_with, MLXEngineError):  # the MLX thread is gone
            self._seats.end_all(turn.aborted_with)
        else:
            self._drive()

    @abc.abstractmethod
    def _burst(self, stop: threading.Event) -> None:
        """Work until there is nothing to do, others wait, or ``stop`` is set; on the MLX thread.

        Whatever happens, nobody in a seat may be left waiting.
        """
