"""The map of its files that each room, a package, draws in its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "mlx_engine"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def folders(folder: Path) -> list[str]:
    return [f"{path.name}/" for path in folder.iterdir() if any(path.glob("*.[pm][yd]"))]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_the_map_of_a_room_names_every_file_and_no_other(room: Path) -> None:
    text = (room / "__init__.py").read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    drawn = re.findall(r"^    (\w+(?:\.py|/))  +\S", docstring, re.MULTILINE)
    files = [path.name for path in room.glob("*.py") if path.name != "__init__.py"]
    assert sorted(drawn) == sorted([*files, *folders(room)])


def test_the_readme_names_every_room_and_no_other() -> None:
    section = (ROOT / "README.md").read_text("utf-8").split("## What is where")[1]
    drawn = re.findall(r"^ *(\w+/)  +\S", section, re.MULTILINE)
    rooms = [f"{room.name}/" for room in ROOMS]
    assert sorted(drawn) == sorted([*rooms, "guide/", "tests/", "benchmarks/"])
