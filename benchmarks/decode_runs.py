"""What ``benchmarks.decode`` measures: cycles, requests, and all of one model and text."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.spread import Spread


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle: proposals, of which accepted, and seconds."""

    depth: int
    accepted: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """One request.

    Attributes:
        decode: seconds from the first token to the last.
        total: seconds from the call to its return.
        cpu: processor seconds of the process over the same time.
        proposed: tokens.
        accepted: of them.
        cycles: of its decoding, but for the last one; none where nothing is proposed ever.
    """

    decode: float
    total: float
    cpu: float
    proposed: int = 0
    accepted: int = 0
    cycles: tuple[Cycle, ...] = ()


@dataclass(slots=True)
class Measured:
    """Of one model and text: runs by way, one a round and prompt, and plain's beside each."""

    tokens: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    plain: dict[str, list[Run]] = field(default_factory=dict)

    def add(self, name: str, run: Run, plain: Run) -> None:
        """A run, and plain's of the same round and prompt."""
        self.runs.setdefault(name, []).append(run)
        self.plain.setdefault(name, []).append(plain)

    def speed(self, name: str, of: Callable[[Run], float]) -> Spread:
        """Of plain's, within each round and prompt."""
        pairs = zip(self.runs[name], self.plain[name], strict=True)
        return Spread.of(of(plain) / of(run) for run, plain in pairs)

    def rate(self, name: str) -> Spread:
        """Tokens a second while decoding."""
        return Spread.of((self.tokens - 1) / run.decode for run in self.runs[name])

    def cycles(self, name: str) -> list[Cycle]:
        """Of all runs."""
        return [cycle for run in self.runs[name] for cycle in run.cycles]

    def acceptance(self, name: str) -> float | None:
        """Accepted of proposed tokens, all runs together."""
        proposed = sum(run.proposed for run in self.runs[name])
        accepted = sum(run.accepted for run in self.runs[name])
        return accepted / proposed if proposed else None

    def per_verification(self, name: str) -> float | None:
        """Tokens that a cycle with proposals gives."""
        given = [cycle.accepted + 1 for cycle in self.cycles(name) if cycle.depth]
        return statistics.mean(given) if given else None

    def by_depth(self, name: str) -> dict[int, list[Cycle]]:
        """Cycles by how many tokens they proposed."""
        found: dict[int, list[Cycle]] = {}
        for cycle in self.cycles(name):
            found.setdefault(cycle.depth, []).append(cycle)
        return dict(sorted(found.items()))


def decode_seconds(run: Run) -> float:
    return run.decode


def total_seconds(run: Run) -> float:
    return run.total


def cpu_seconds(run: Run) -> float:
    return run.cpu
