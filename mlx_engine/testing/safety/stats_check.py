"""An engine's counters, before something and after it."""

from __future__ import annotations

import time
from typing import Final

from mlx_engine.engine.base import BaseEngine
from mlx_engine.testing.safety.fault import Fault

_REST: Final = 2.0  # seconds in which an engine comes to rest; one elsewhere tells late
_LOOK: Final = 0.002  # seconds


class StatsCheck:
    """A check of ``stats()``: what it says now is compared with what it says later."""

    def __init__(self, engine: BaseEngine) -> None:
        self._engine = engine
        self._before = engine.stats()

    def check(self, usual: float, counts: tuple[int, int] | None = None) -> None:
        """See that the engine is at rest and has counted each request once, or will have soon.

        Args:
            usual: seconds that this may take besides.
            counts: requests that gave a result, and all that were made; ``None``: not known.

        Raises:
            Fault: it is not, or has not.
        """
        end = time.monotonic() + _REST + usual
        while problem := self._problem(counts):
            if time.monotonic() > end:
                raise Fault(problem)
            time.sleep(_LOOK)

    def _problem(self, counts: tuple[int, int] | None) -> str | None:
        before, now = self._before, self._engine.stats()
        if now.running or now.waiting:
            return f"afterwards stats() has {now.running} running and {now.waiting} waiting"
        if counts is None:
            return None
        told, asked = counts
        change = {
            name: getattr(now, name) - getattr(before, name)
            for name in ("finished", "cancelled", "failed", "rejected")
        }
        wrong = change["failed"] or change["rejected"]
        if told <= sum(change.values()) <= asked and not wrong:
            return None
        counted = ", ".join(f"{count} {name}" for name, count in change.items())
        return f"of {asked} requests, of which {told} gave a result, stats() counts {counted}"
