"""Numbers -> Markdown on standard output, JSON in a folder, and a picture where one can be made."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.drawing import save_picture

if TYPE_CHECKING:
    from benchmarks.setting import Setting

Record = dict[str, Any]  # what is in a JSON file
Draw = Callable[[Record], Any]  # a record -> a matplotlib figure, ``None`` without matplotlib

INTERVAL = "Numbers are median [min, max]."


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


def machine() -> Record:
    """What the numbers depend on; nothing that tells one machine from another of its kind."""
    mac = platform.mac_ver()[0]
    return {
        "platform": f"macOS {mac}" if mac else platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlx_engine": version("mlx-engine"),
    }


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is aligned left, the others right."""
    lines = [list(head), [":--", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe(record: Record) -> str:
    """One line on the machine and the day of a record."""
    what = record["machine"]
    return (
        f"{what['platform']} {what['architecture']}, {what['processors']} processors "
        f"(load {what['load_before']} before), Python {what['python']}, mlx {what['mlx']}, "
        f"mlx-lm {what['mlx_lm']}, {record['date']}"
    )


def read_json(path: Path) -> Record:
    """What a report has written."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


class Report:
    """What a benchmark finds: printed as it comes, written at the end.

    Args:
        setting: of the benchmark.
        about: what was done, in a line or two.
        picture: name of the picture's file; that of the benchmark by default.
    """

    def __init__(self, setting: Setting, about: str, *, picture: str | None = None) -> None:
        self._setting = setting
        self._picture = picture or f"{setting.name}.png"
        self._head: Record = {
            "benchmark": setting.name,
            "mode": setting.mode,
            "date": setting.date,
            "machine": setting.machine,
            "about": about,
        }
        self._parts: list[str] = []
        quick = "\nA quick run: to see that it works, its numbers are no result."
        print(f"{describe(self._head)}{quick if setting.quick else ''}\n{about}", flush=True)

    def add(self, part: str) -> None:
        """Markdown: a table, or a line. The first one should answer the benchmark's question."""
        self._parts.append(part)
        print(f"\n{part}", flush=True)

    def finish(self, found: Record, draw: Draw | None) -> None:
        """Write JSON, and the picture that ``draw`` makes of it."""
        record = {
            **self._head,
            "seconds": round(time.perf_counter() - self._setting.started, 1),
            "picture": self._picture if draw else None,
            "parts": self._parts,
            **found,
        }
        folder = self._setting.out
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, allow_nan=False)
        (folder / f"{self._setting.name}.json").write_text(text + "\n", encoding="utf-8")
        if draw is not None:
            save_picture(draw(record), folder / self._picture)
