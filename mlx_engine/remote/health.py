"""Whether an engine elsewhere is well: not that it answers, but that its work goes on."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_engine.outputs import EngineState
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.wire.heartbeat import Beat, Phase, Watchdog, judge, seconds_since_step


@dataclass(frozen=True, slots=True)
class Health:
    """How an engine elsewhere does; made of what is known here, without asking it.

    Attributes:
        healthy: it takes requests, or finishes those it has, and its work goes on.
        reason: why it is not healthy, in words; empty if it is.
        phase: what it was doing at the latest heartbeat.
        pending: requests that it had then.
        seconds_since_step: since its work last made progress, or since there was none to do.
        seconds_since_beat: since the latest heartbeat.
    """

    healthy: bool
    reason: str
    phase: Phase
    pending: int
    seconds_since_step: float
    seconds_since_beat: float


def health_of(
    state: EngineState,
    now: float,
    last_beat: float,
    beat: Beat,
    limits: Watchdog,
    last_exit: Exit | None = None,
) -> Health:
    """The health of an engine in ``state``. A pure function.

    Args:
        state: where it is in its life. One that starts is not healthy yet.
        now, last_beat, beat, limits: as ``judge`` takes them.
        last_exit: how it ended, if it has.
    """
    return Health(
        healthy=not (reason := _why_not(state, now, last_beat, beat, limits, last_exit)),
        reason=reason,
        phase=beat.phase,
        pending=beat.pending,
        seconds_since_step=seconds_since_step(now, last_beat, beat),
        seconds_since_beat=now - last_beat,
    )


def _why_not(
    state: EngineState,
    now: float,
    last_beat: float,
    beat: Beat,
    limits: Watchdog,
    last_exit: Exit | None,
) -> str:
    if last_exit is not None:
        return f"it has ended: {last_exit.detail}"
    match state:
        case EngineState.CREATED:
            return "it has not been started"
        case EngineState.STOPPED:
            return "it has been stopped"
        case EngineState.FAILED:
            return "it has failed"
        case EngineState.STARTING:
            return judge(now, last_beat, beat, limits) or "it is still starting"
        case EngineState.RUNNING | EngineState.DRAINING:
            return judge(now, last_beat, beat, limits) or ""
