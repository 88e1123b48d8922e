"""Numbers -> Markdown on standard output, JSON in a folder, and a picture where one can be made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawing import save_picture
from benchmarks.setting import Setting
from benchmarks.spread import Record

Draw = Callable[[Record], Any]  # a record -> a matplotlib figure, ``None`` without matplotlib

INTERVAL = "Numbers are median [min, max]."


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
