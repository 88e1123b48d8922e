"""Complaints in a host's log, of clients that do not behave: of many, again and again."""

from __future__ import annotations

import logging
import time

_GAP = 10.0  # seconds between two lines of a kind

_log = logging.getLogger("mlx_engine.host")


class Complaints:
    """Lines in the log ``mlx_engine.host``: one of a kind in ten seconds; others count."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}  # by time.monotonic
        self._left_out: dict[str, int] = {}

    def log(self, kind: str, text: str) -> None:
        """Log a line, unless there was one of its kind just now.

        Args:
            kind: one of few.
            text: may have bytes of a stranger in it.
        """
        now = time.monotonic()
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next[kind] = now + _GAP
        count = self._left_out.pop(kind, 0)
        more = f" (and {count} more like that since the last such line)" if count else ""
        _log.warning("%.320s%s", " ".join(text.split()), more)
