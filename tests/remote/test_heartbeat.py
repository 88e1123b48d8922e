"""The watchdog's rules, and what health says."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine import EngineState, InvalidRequest
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.health import health_of
from mlx_engine.remote.wire.heartbeat import Watchdog, judge
from mlx_engine.remote.wire.messages import Heartbeat, Phase

LIMITS = Watchdog(start=600.0, prefill=500.0, decode=300.0, silence=60.0)
NO_SILENCE = Watchdog(start=600.0, prefill=500.0, decode=300.0, silence=None)
NONE = Watchdog(start=None, prefill=None, decode=None, silence=None)


def beat(phase: Phase, age: float, pending: int = 0) -> Heartbeat:
    return Heartbeat(progress=7, phase=phase, age=age, pending=pending)


@pytest.mark.parametrize(
    ("quiet", "latest", "limits", "verdict"),
    [
        # Nothing to say.
        (0.2, beat("start", 0.0), LIMITS, None),
        (0.2, beat("decode", 0.0, 3), LIMITS, None),
        # A limit is reached only beyond it, and the age grows while no beat comes.
        (10.0, beat("load", 590.0), LIMITS, None),
        (11.0, beat("load", 590.0), LIMITS, "loading the model for 601 s (Watchdog.start=600)"),
        (10.0, beat("start", 591.0), LIMITS, "starting for 601 s (Watchdog.start=600)"),
        (0.0, beat("prefill", 500.0, 1), LIMITS, None),
        (
            0.25,
            beat("prefill", 501.0, 1),
            LIMITS,
            "no prefill chunk for 501 s, while 1 request is pending (Watchdog.prefill=500)",
        ),
        (
            1.0,
            beat("decode", 300.0, 3),
            LIMITS,
            "no decode step for 301 s, while 3 requests are pending (Watchdog.decode=300)",
        ),
        # Each phase has its own limit.
        (0.0, beat("prefill", 400.0, 1), LIMITS, None),
        (0.0, beat("load", 400.0), LIMITS, None),
        # Without requests nothing is expected of these.
        (0.0, beat("prefill", 9e9, 0), LIMITS, None),
        (0.0, beat("decode", 9e9, 0), LIMITS, None),
        (0.0, beat("idle", 9e9, 0), LIMITS, None),
        (0.0, beat("idle", 9e9, 2), LIMITS, None),
        # Silence is one in every phase.
        (60.0, beat("idle", 0.0), LIMITS, None),
        (61.0, beat("start", 0.0), LIMITS, "no sign of life for 61 s"),
        (61.0, beat("load", 0.0), LIMITS, "no sign of life for 61 s"),
        (61.0, beat("idle", 0.0), LIMITS, "the last one in phase 'idle' (Watchdog.silence=60)"),
        (61.0, beat("prefill", 0.0, 1), LIMITS, "no sign of life for 61 s"),
        (61.0, beat("decode", 0.0, 1), LIMITS, "no sign of life for 61 s"),
        # A limit that is None is none.
        (9e9, beat("idle", 0.0), NO_SILENCE, None),
        (301.0, beat("decode", 0.0, 1), NO_SILENCE, "no decode step for 301 s"),
        *((9e9, beat(phase, 9e9, 5), NONE, None) for phase in ("start", "load", "idle")),
        *((9e9, beat(phase, 9e9, 5), NONE, None) for phase in ("prefill", "decode")),
    ],
)
def test_the_verdict(
    quiet: float, latest: Heartbeat, limits: Watchdog, verdict: str | None
) -> None:
    said = judge(1000.0 + quiet, 1000.0, latest, limits)
    if verdict is None:
        assert said is None
    else:
        assert said is not None
        assert verdict in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, 0) for name in ("start", "prefill", "decode", "silence")),
        ("start", -1.0),
        ("decode", float("nan")),
        ("silence", True),
        ("prefill", "600"),
        ("action", "restart"),
        ("action", None),
    ],
)
def test_limits_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Watchdog(**{option: value})
    assert refused.value.option == option


@pytest.mark.parametrize(
    ("state", "latest", "reason"),
    [
        (EngineState.RUNNING, beat("idle", 1e6), ""),
        (EngineState.DRAINING, beat("decode", 1.0, 1), ""),
        (EngineState.RUNNING, beat("decode", 301.0, 1), "no decode step"),
        (EngineState.STARTING, beat("load", 1.0), "still starting"),
        (EngineState.STARTING, beat("load", 601.0), "loading the model for 602 s"),
        (EngineState.CREATED, Heartbeat(), "not been started"),
        (EngineState.STOPPED, Heartbeat(), "been stopped"),
        (EngineState.FAILED, Heartbeat(), "failed"),
    ],
)
def test_health_is_that_work_goes_on(state: EngineState, latest: Heartbeat, reason: str) -> None:
    health = health_of(state, 5.0, 4.0, latest, Watchdog(silence=None))
    assert health.healthy is not bool(reason)
    assert reason in health.reason
    assert health.seconds_since_beat == 1.0
    assert health.seconds_since_step == latest.age + 1.0
    assert (health.phase, health.pending) == (latest.phase, latest.pending)


def test_what_has_ended_is_not_healthy_and_says_how_it_ended() -> None:
    ended = Exit("crash", "its process was ended by SIGKILL")
    health = health_of(EngineState.FAILED, 5.0, 4.0, beat("decode", 0.0, 1), LIMITS, ended)
    assert not health.healthy
    assert "SIGKILL" in health.reason
