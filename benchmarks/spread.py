"""Repeated measurements of one thing, as they are told and as they are kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]  # what is in a JSON file


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        return cls(tuple(values))

    @classmethod
    def read(cls, record: Record) -> Spread:
        """What ``record()`` gave."""
        return cls(tuple(record["values"]))

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def percentile(self, percent: float) -> float:
        """The smallest value that ``percent`` of all values do not exceed."""
        ordered = sorted(self.values)
        return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]

    def text(self, digits: int, scale: float = 1.0) -> str:
        """``median [min, max]``, each times ``scale``."""
        low, middle, high = (
            f"{value * scale:.{digits}f}"
            for value in (min(self.values), self.median, max(self.values))
        )
        return f"{middle} [{low}, {high}]"

    def record(self) -> Record:
        """For JSON: the summary and every value."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }
