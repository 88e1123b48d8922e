"""All results in a folder -> one page, README.md beside them; and their pictures once more."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from benchmarks import NAMES
from benchmarks.drawing import save_picture
from benchmarks.report import describe, markdown_table, read_json
from benchmarks.spread import Record

_HERE = Path(__file__).parent
_HEAD = """# Results

Written by `python -m benchmarks`, from the JSON files in this folder, which have every value.
{mode} Numbers are median [min, max]; each ratio and difference is taken within one round.
"""
_MODES = {
    "quick": "These are **quick runs**: they show that all works, their numbers are no result.",
    "full": "These are full runs.",
}


def results_in(folder: Path) -> Iterator[Record]:
    """What the benchmarks have written there, in their order."""
    for name in NAMES:
        path = folder / f"{name}.json"
        if path.exists() and (record := read_json(path)).get("benchmark") == name:
            yield record


def write_page(folder: Path) -> None:
    """Write README.md; nothing happens where there are no results."""
    records = list(results_in(folder))
    if not records:
        return
    modes = " ".join(text for mode, text in _MODES.items() if mode in {r["mode"] for r in records})
    rows = [
        [
            f"[{_question(record['benchmark'])}](#{record['benchmark']})",
            record["mode"],
            record["date"],
            f"{record['seconds']:.0f} s",
        ]
        for record in records
    ]
    contents = markdown_table(["question", "mode", "date", "took"], rows)
    parts = [_HEAD.format(mode=modes), contents, *map(_section, records)]
    (folder / "README.md").write_text("\n\n".join(map(str.strip, parts)) + "\n", "utf-8")


def draw_again(folder: Path) -> list[str]:
    """Draw the pictures of all results from their JSON; returns the names of their files."""
    drawn = []
    for record in results_in(folder):
        if record["picture"] is not None:
            draw = import_module(f"benchmarks.{record['benchmark']}").draw
            save_picture(draw(record), folder / record["picture"])
            drawn.append(record["picture"])
    return drawn


def _section(record: Record) -> str:
    """Up to the first table in sight, the rest folded."""
    parts: list[str] = record["parts"]
    tables = [place for place, part in enumerate(parts) if part.startswith("|")]
    shown = tables[0] + 1 if tables else len(parts)
    lines = [f"## {record['benchmark']}", _question(record["benchmark"])]
    lines.append(
        f"{describe(record)}; {record['mode']}, {record['seconds']:.0f} s. {record['about']}"
    )
    if record["picture"] is not None:
        lines.append(f"![{record['benchmark']}]({record['picture']})")
    lines += parts[:shown]
    if parts[shown:]:
        folded = ["<details><summary>More</summary>", *parts[shown:], "</details>"]
        lines += folded
    return "\n\n".join(lines)


def _question(name: str) -> str:
    """That a benchmark answers: the first line of its module."""
    text = (_HERE / f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
