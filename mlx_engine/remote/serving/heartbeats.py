"""What an engine tells of itself, again and again, to those who use it from elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlx_engine.outputs import Progress
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.wire.heartbeat import Phase
from mlx_engine.remote.wire.messages import Heartbeat

if TYPE_CHECKING:
    from mlx_engine.engine.local import LocalEngine


class Heartbeats:
    """Counts the steps of an engine in this process.

    Attributes:
        phase: ``start`` or ``load``, until there is an engine.
        engine: once it runs.
        sessions: those who use it.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.engine: LocalEngine | None = None
        self.sessions: set[ClientRequests] = set()
        self._loaded = 0
        self._answered = 0
        self._seen = -1
        self._since = time.monotonic()

    @property
    def pending(self) -> int:
        """Requests of all sessions that are not over."""
        return sum(session.pending for session in self.sessions)

    def load_progress(self, progress: Progress) -> None:
        """A step of the load."""
        self._loaded += 1

    def request_over(self) -> None:
        """A request is over, which is a step too."""
        self._answered += 1

    def stood_still(self, seconds: float) -> None:
        """This process was stopped, or had no processor: that counts for nothing."""
        self._since = min(time.monotonic(), self._since + seconds)

    def beat(self) -> Heartbeat:
        """What there is to tell now."""
        pending, steps, stats = 0, self._loaded, None
        if self.engine is not None:
            meter, pending = self.engine.counters, self.pending
            steps += meter.steps + self._answered
            self.phase = meter.phase if pending else "idle"
            stats = self.engine.stats()
        now = time.monotonic()
        if steps != self._seen or self.phase == "idle":
            self._seen, self._since = steps, now
        return Heartbeat(steps, self.phase, now - self._since, pending, stats)
