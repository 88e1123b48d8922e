"""The end of an engine elsewhere, as far as it is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_engine.errors import EngineDead

ExitKind = Literal["graceful", "crash", "stalled"]


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of the process or actor behind an engine.

    Attributes:
        kind: ``graceful`` was asked for and done (a shutdown, SIGTERM), ``stalled`` is an end
            that the watchdog made, ``crash`` is any other.
        detail: what is known of it, in words.
        exit_code: of its process; negative is the number of the signal that ended it.
        signal: the name of that signal.
        phase: what the engine was doing: ``start``, ``load``, ``idle``, ``prefill``, ``decode``.
        stderr: the last lines of its standard error, stacks included.
    """

    kind: ExitKind
    detail: str
    exit_code: int | None = None
    signal: str | None = None
    phase: str = "start"
    stderr: str = ""

    def error(self, reason: str | None = None) -> EngineDead:
        """The error of those that it meets, a new one each time.

        Args:
            reason: its message; ``None`` is that of a request that was in flight.
        """
        return EngineDead(
            reason
            or f"the engine is gone: {self.detail} (while in phase {self.phase!r}); "
            "await engine.restart() brings it back, which an EngineManager does by itself",
            exit_code=self.exit_code,
            signal=self.signal,
            phase=self.phase,
            stderr=self.stderr,
        )
