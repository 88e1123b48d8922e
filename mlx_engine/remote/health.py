"""Health of an engine elsewhere: not that it answers, but that its work goes on."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_engine.outputs import EngineState
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.wire.heartbeat import Watchdog, judge, seconds_since_step
from mlx_engine.remote.wire.messages import Heartbeat, Phase


@dataclass(frozen=True, slots=True)
class Health:
    """The health of an engine elsewhere; made of what is known here, without asking it.

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
    beat: Heartbeat,
    limits: Watchdog,
    last_exit: Exit | None = None,
) -> Health:
    """The health of an engine in ``state``. A pure function.

    Args:
        state: where it is in its life. One that starts is not healthy yet.
        now, last_beat, beat, limits: as ``judge`` takes them.
        last_exit: how it ended, if it has.
    """
    if last_exit is not None:
        reason = f"it has ended: {last_exit.detail}"
    elif state in _NOT_THERE:
        reason = _NOT_THERE[state]
    else:
        starting = "it is still starting" if state is EngineState.STARTING else ""
        reason = judge(now, last_beat, beat, limits) or starting
    step, quiet = seconds_since_step(now, last_beat, beat), now - last_beat
    return Health(not reason, reason, beat.phase, beat.pending, step, quiet)


_NOT_THERE = {
    EngineState.CREATED: "it has not been started",
    EngineState.STOPPED: "it has been stopped",
    EngineState.FAILED: "it has failed",
}
