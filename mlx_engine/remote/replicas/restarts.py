"""Restarts of replicas that have ended, and when that is given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from mlx_engine.checks import check_options, integer, number, option
from mlx_engine.errors import InvalidRequest

_MOST_DOUBLINGS = 64  # more than that overflows, and no wait is that long


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The limits on restarts of a replica after crashes, stalls and failed restarts.

    Attributes:
        max_restarts: restarts within ``window``; the next end is the last one. 0 is none.
        window: seconds of running after which an end is forgotten. Time in which the replica
            waits, starts or loads does not count, so that a model that takes minutes to load
            and then crashes is given up as well.
        backoff: seconds before the first restart; they double with each end in the window.
        max_backoff: most seconds before a restart.

    Raises:
        InvalidRequest: a value is out of its range.
    """

    max_restarts: Annotated[int, option(integer, low=0)] = 5
    window: Annotated[float, option(number, low=0, above=True, endless=True, what="seconds")] = (
        600.0
    )
    backoff: Annotated[float, option(number, low=0, what="seconds")] = 0.5
    max_backoff: Annotated[float, option(number, low=0, what="seconds")] = 30.0

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_backoff < self.backoff:
            raise InvalidRequest("max_backoff", f"must not be below backoff={self.backoff:g}")


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again ``after`` so many seconds."""

    after: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it; ``reason`` says why, in words."""

    reason: str


def decide(policy: RestartPolicy, ends: Sequence[float], now: float) -> Restart | GiveUp:
    """The verdict on an end: what follows from it. A pure function.

    Args:
        ends: the earlier ends, in seconds on the clock of ``now``.
        now: of this one.
    """
    recent = 1 + sum(now - end < policy.window for end in ends)
    if recent > policy.max_restarts:
        times = "once" if recent == 1 else f"{recent} times within {policy.window:g} s of running"
        return GiveUp(f"it ended {times} (RestartPolicy.max_restarts={policy.max_restarts})")
    doublings = min(recent - 1, _MOST_DOUBLINGS)
    return Restart(min(policy.max_backoff, policy.backoff * 2.0**doublings))


class RestartHistory:
    """The ends of one replica. Reads no clock: it is told the time.

    Args:
        policy: what is to follow from them.
    """

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._ends: list[float] = []  # in seconds of running, all lives together
        self._ran = 0.0
        self._since: float | None = None

    def started(self, now: float) -> None:
        """Count its time of running from now on."""
        self._since = now

    def ended(self, now: float, *, counts: bool = True) -> Restart | GiveUp:
        """Decide what follows: it has ended, or its start has failed.

        Args:
            counts: whether that was a failure. One that was not is followed by a restart
                after the first wait, and is not remembered.
        """
        if self._since is not None:
            self._ran += now - self._since
            self._since = None
        if not counts:
            return Restart(self._policy.backoff)
        ends = [end for end in self._ends if self._ran - end < self._policy.window]
        self._ends = [*ends, self._ran]
        return decide(self._policy, ends, self._ran)
