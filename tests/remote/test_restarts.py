"""When a replica is started again, and when that is given up."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine import InvalidRequest
from mlx_engine.remote.replicas.restarts import (
    GiveUp,
    Restart,
    RestartHistory,
    RestartPolicy,
    decide,
)

POLICY = RestartPolicy(max_restarts=3, window=100.0, backoff=0.5, max_backoff=1.5)


@pytest.mark.parametrize(
    ("ends", "now", "verdict"),
    [
        ([], 0.0, Restart(0.5)),
        ([0.0], 1.0, Restart(1.0)),
        ([0.0, 1.0], 2.0, Restart(1.5)),  # 2.0, but for max_backoff
        ([0.0, 1.0, 2.0], 3.0, GiveUp),
        ([0.0, 1.0, 2.0], 100.0, Restart(1.5)),  # the first one is forgotten
        ([0.0, 1.0, 2.0], 102.0, Restart(0.5)),
    ],
)
def test_the_verdict(ends: list[float], now: float, verdict: Any) -> None:
    said = decide(POLICY, ends, now)
    if verdict is GiveUp:
        assert said == GiveUp(
            "it ended 4 times within 100 s of running (RestartPolicy.max_restarts=3)"
        )
    else:
        assert said == verdict


def test_no_restarts_at_all() -> None:
    said = decide(RestartPolicy(max_restarts=0), [], 0.0)
    assert said == GiveUp("it ended once (RestartPolicy.max_restarts=0)")


def test_waits_do_not_overflow() -> None:
    policy = RestartPolicy(max_restarts=10_000, max_backoff=30.0)
    assert decide(policy, [0.0] * 5_000, 1.0) == Restart(30.0)


def test_ends_are_forgotten_after_a_window_of_running() -> None:
    history = RestartHistory(POLICY)
    clock = 0.0
    for _ in range(20):
        history.started(clock)
        clock += 100.0
        assert history.ended(clock) == Restart(0.5)


def test_time_in_which_it_does_not_run_forgets_nothing() -> None:
    history = RestartHistory(POLICY)
    clock = 0.0
    verdicts = []
    for _ in range(4):
        clock += 5_000.0  # loads for ever
        history.started(clock)
        clock += 1.0
        verdicts.append(history.ended(clock))
    assert isinstance(verdicts[-1], GiveUp)


def test_a_start_that_fails_is_an_end() -> None:
    history = RestartHistory(POLICY)
    history.started(0.0)
    verdicts = [history.ended(float(clock)) for clock in range(1, 5)]
    assert verdicts[:3] == [Restart(0.5), Restart(1.0), Restart(1.5)]
    assert isinstance(verdicts[3], GiveUp)


def test_an_end_that_was_no_failure_is_not_remembered() -> None:
    history = RestartHistory(RestartPolicy(max_restarts=1, backoff=0.5))
    for clock in range(50):
        history.started(float(clock))
        assert history.ended(clock + 0.5, counts=False) == Restart(0.5)
    assert history.ended(51.0) == Restart(0.5)
    assert isinstance(history.ended(52.0), GiveUp)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_restarts", -1),
        ("max_restarts", 1.5),
        ("max_restarts", True),
        ("max_restarts", None),
        ("window", 0),
        ("window", float("nan")),
        ("window", "600"),
        ("backoff", -0.1),
        ("backoff", float("nan")),
        ("backoff", False),
        ("max_backoff", float("inf")),
        ("max_backoff", 0.1),  # below backoff
    ],
)
def test_policies_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RestartPolicy(**{option: value})
    assert refused.value.option == option
