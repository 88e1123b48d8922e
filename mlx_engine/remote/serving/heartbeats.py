"""Heartbeats: what an engine tells of itself, again and again, to those who use it elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.wire.messages import Heartbeat, Phase

if TYPE_CHECKING:
    from mlx_engine.engine.in_process import InProcessEngine


class Heartbeats:
    """Counts the steps of an engine in this process.

    Attributes:
        phase: ``start`` or ``load``, until there is an engine.
        loading: the engine before that, as soon as there is one.
        engine: once it runs.
        clients: the requests of each of those who use it.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.loading: InProcessEngine | None = None
        self.engine: InProcessEngine | None = None
        self.clients: set[ClientRequests] = set()
        self._steps = 0  # of the load, and requests that are over
        self._seen = -1
        self._since = time.monotonic()

    @property
    def pending(self) -> int:
        """Requests of all clients that are not over."""
        return sum(client.pending for client in self.clients)

    def step(self) -> None:
        """Count a step of the load, or a request that is over."""
        self._steps += 1

    def stood_still(self, seconds: float) -> None:
        """Leave out a time in which this process was stopped, or had no processor."""
        self._since = min(time.monotonic(), self._since + seconds)

    def heartbeat(self) -> Heartbeat:
        """The heartbeat of now."""
        pending, steps, stats = 0, self._steps, None
        if self.engine is not None:
            counters, pending = self.engine.counters, self.pending
            steps += counters.steps + counters.pieces
            self.phase = counters.phase if pending else "idle"
            stats = self.engine.stats()
        elif self.loading is not None:
            stats = self.loading.stats()
        now = time.monotonic()
        if steps != self._seen or self.phase == "idle":
            self._seen, self._since = steps, now
        return Heartbeat(steps, self.phase, now - self._since, pending, stats)
