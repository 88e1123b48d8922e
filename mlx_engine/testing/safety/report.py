"""The report of a check of cancellation."""

from __future__ import annotations

import os
import platform
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from mlx_engine.errors import describe
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.timeouts import Hang


@dataclass(frozen=True, slots=True)
class SafetyRow:
    """An operation that was cancelled in one way, at several moments.

    Attributes:
        operation: its name.
        way: the name of the way.
        struck: how often it was under way at the moment, so that it was cancelled.
        tried: how often it was tried.
        planned: moments there are.
        longest: seconds from a cancellation until its caller was told, which is when its work
            is out of MLX; ``None`` if nobody was told.
        failures: how often a promise was not kept.
    """

    operation: str
    way: str
    struck: int
    tried: int
    planned: int
    longest: float | None
    failures: int


@dataclass(frozen=True, slots=True)
class SafetyFailure:
    """A promise that was not kept.

    Attributes:
        where: operation, way and moment, as ``only`` takes them.
        problem: in a sentence.
        details: the stacks of all threads, if something did not come to its end; the traceback
            of what the engine raised.
    """

    where: str
    problem: str
    details: str = ""

    @classmethod
    def of(cls, where: str, error: Exception) -> SafetyFailure:
        """The failure that an error tells of."""
        if isinstance(error, Fault):
            return cls(where, str(error))
        if isinstance(error, Hang):
            return cls(where, str(error), error.stacks)
        details = "".join(traceback.format_exception(error))
        return cls(where, f"it raised {describe(error)}", details)


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """Everything that was tried, and what came of it. ``str(report)`` is Markdown.

    Attributes:
        engine: its class.
        rows: one for each operation and way.
        failures: in order; later ones may come of the first.
        notes: what was not tried or not compared, one sentence each.
        machine: system and versions.
        seed: that chose the moments, if there was no time for all.
        seconds: that all of it took.
    """

    engine: str
    rows: tuple[SafetyRow, ...]
    failures: tuple[SafetyFailure, ...]
    notes: tuple[str, ...]
    machine: str
    seed: int
    seconds: float

    @property
    def struck(self) -> int:
        """Number of cancellations."""
        return sum(row.struck for row in self.rows)

    @property
    def tried(self) -> int:
        """Number of moments that were tried."""
        return sum(row.tried for row in self.rows)

    @property
    def planned(self) -> int:
        """Number of moments that there are."""
        return sum(row.planned for row in self.rows)

    def __str__(self) -> str:
        parts = [
            f"{self.engine}: cancelled {self.struck} times, at {self.tried} of {self.planned} "
            f"moments, {_count(len(self.failures))}; {self.seconds:.0f} s, seed {self.seed}",
            self.machine,
            _table(self.rows),
            *(f"- {note}" for note in self.notes),
            *map(self.tell, self.failures),
        ]
        return "\n\n".join(parts).replace("\n\n- ", "\n- ")

    def tell(self, failure: SafetyFailure) -> str:
        """One failure, and how to see it again."""
        lines = [f"**{failure.where}**: {failure.problem}"]
        if failure.where.count(" / ") == 2:
            lines.append(f'Again, with chances: only="{failure.where}", seed={self.seed}')
        if failure.details:
            lines.append(f"```\n{failure.details.rstrip()}\n```")
        return "\n\n".join(lines)


class NotCancellationSafe(AssertionError):
    """An engine does not keep what it promises about cancellation.

    Attributes:
        report: all that was tried.
    """

    def __init__(self, report: SafetyReport) -> None:
        super().__init__("\n\n".join(map(report.tell, report.failures)))
        self.report = report


def machine() -> str:
    """System and versions; nothing that tells one machine from another of its kind."""
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else platform.system()
    versions = ", ".join(f"{name} {_version(name)}" for name in ("mlx", "mlx-lm", "mlx-engine"))
    return (
        f"{system} {platform.machine()}, {os.cpu_count()} processors, "
        f"Python {platform.python_version()}, {versions}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(none)"


def _table(rows: Sequence[SafetyRow]) -> str:
    """A row for each operation, and a column for each way with how often it was cancelled so."""
    ways = list(dict.fromkeys(row.way for row in rows))
    head = ["operation", *ways, "tried", "of", "longest, ms", "failures"]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    for operation in dict.fromkeys(row.operation for row in rows):
        own = {row.way: row for row in rows if row.operation == operation}
        longest = max(
            (row.longest for row in own.values() if row.longest is not None), default=None
        )
        lines.append(
            [
                operation,
                *(str(own[way].struck) if way in own else "" for way in ways),
                str(sum(row.tried for row in own.values())),
                str(sum(row.planned for row in own.values())),
                "" if longest is None else f"{longest * 1000:.1f}",
                str(sum(row.failures for row in own.values())),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _count(failures: int) -> str:
    return {0: "no failure", 1: "1 failure"}.get(failures, f"{failures} failures")
