"""The watchdog's rules: when an engine elsewhere counts as stuck, by its heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_engine.checks import choice, number_or_none
from mlx_engine.remote.wire.messages import Heartbeat, Phase

HEARTBEAT_INTERVAL = 0.25  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """The limits above which an engine in another process counts as stuck, and what happens then.

    Attributes:
        start: seconds without progress while the process starts and the model is loaded.
        prefill: seconds without progress in prefill; a prefill chunk is one step.
        decode: seconds without a decode step while there are requests.
        silence: seconds without any sign of life. The process gives one four times a second,
            unless it is stopped, starved, or native code holds Python's GIL.
        action: ``"kill"`` ends the process, whose requests get ``EngineDead`` with the stacks
            of its threads; ``"report"`` only logs a warning with them.

    ``None`` for a limit is no limit. Be generous: on a slow machine a prefill chunk may take
    minutes, as may the first one of a model on any.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    start: float | None = 600.0
    prefill: float | None = 600.0
    decode: float | None = 300.0
    silence: float | None = 60.0
    action: Literal["kill", "report"] = "kill"

    def __post_init__(self) -> None:
        for name in ("start", "prefill", "decode", "silence"):
            limit = number_or_none(
                name, getattr(self, name), low=0, above=True, endless=True, what="seconds"
            )
            object.__setattr__(self, name, limit)
        choice("action", self.action, ("kill", "report"))

    @property
    def tick(self) -> float:
        """Seconds after which to look again."""
        limits = (self.start, self.prefill, self.decode, self.silence)
        return min(1.0, *(limit / 4 for limit in limits if limit is not None), 1.0)


def judge(now: float, last_beat: float, beat: Heartbeat, limits: Watchdog) -> str | None:
    """The verdict on an engine that is stuck, in words; ``None`` if it is not. A pure function.

    Args:
        now, last_beat: seconds on one clock; when the latest heartbeat came, or the link was made.
        beat: the latest one.
    """
    quiet = now - last_beat
    if limits.silence is not None and quiet > limits.silence:
        return (
            f"no sign of life for {_rounded(quiet)} s, the last one in phase {beat.phase!r} "
            f"(Watchdog.silence={limits.silence:g})"
        )
    what, name = _STEPS.get(beat.phase, ("", ""))
    if not name or (name != "start" and not beat.pending):
        return None
    limit: float | None = getattr(limits, name)
    age = seconds_since_step(now, last_beat, beat)
    if limit is None or age <= limit:
        return None
    return f"{what} for {_rounded(age)} s{_while_pending(beat.pending)} (Watchdog.{name}={limit:g})"


def seconds_since_step(now: float, last_beat: float, beat: Heartbeat) -> float:
    """The age of the latest step at ``now``, when no newer heartbeat has come."""
    return beat.age + (now - last_beat)


# What there has not been in a phase, and the limit on how long that may last; idle has none.
_STEPS: dict[Phase, tuple[str, str]] = {
    "start": ("no progress in starting", "start"),
    "load": ("no progress in loading the model", "start"),
    "prefill": ("no prefill chunk", "prefill"),
    "decode": ("no decode step", "decode"),
}


def _while_pending(pending: int) -> str:
    if not pending:
        return ""
    return f", while {pending} {'request is' if pending == 1 else 'requests are'} pending"


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"
