"""Numbers -> Markdown on standard output, JSON in a folder, and a plot where one can be made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        return cls(tuple(values))

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

    def record(self) -> dict[str, Any]:
        """For JSON: the summary and every value."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


def machine() -> dict[str, Any]:
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
        "date": datetime.date.today().isoformat(),
    }


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is aligned left, the others right."""
    lines = [list(head), [":--", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def describe(what: dict[str, Any]) -> str:
    """One line on the machine."""
    return (
        f"{what['platform']} {what['architecture']}, {what['processors']} processors "
        f"(load {what['load_before']} before), Python {what['python']}, mlx {what['mlx']}, "
        f"mlx-lm {what['mlx_lm']}, {what['date']}"
    )


def write_json(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write ``name``.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def new_figure(panels: int) -> tuple[Any, list[Any]] | None:
    """A matplotlib figure with ``panels`` axes side by side; ``None`` without matplotlib."""
    try:
        matplotlib = import_module("matplotlib")
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    figure, axes = import_module("matplotlib.pyplot").subplots(
        1, panels, figsize=(5.2 * panels, 3.8), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def draw_dots(axis: Any, rows: dict[str, Spread], label: str, scale: float = 1.0) -> None:
    """One line a row: a dot for each value, a bar at the median."""
    for place, spread in enumerate(rows.values()):
        values = [value * scale for value in spread.values]
        axis.plot(values, [place] * len(values), "o", alpha=0.4, markersize=5)
        axis.plot([spread.median * scale], [place], "|", color="black", markersize=22)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
