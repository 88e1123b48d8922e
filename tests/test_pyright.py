"""What pyright, in its strict mode, says of applications and of the guide's recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_recipes import RECIPES
from tests.test_types import RIGHT, WRONG
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """Errors in each program, by line: all in one run, since it reads the package in seconds."""
    pytest.importorskip("basedpyright")
    folder = tmp_path_factory.mktemp("pyright")
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "include": ["."], "extraPaths": [str(ROOT)]})
    )
    recipes = {f"recipe{number}": code for number, code in enumerate(RECIPES.values())}
    programs = {"right": RIGHT, "wrong": WRONG, **recipes}
    for name, code in programs.items():
        (folder / f"{name}.py").write_text(code)
    options = ["--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        cwd=folder,
    )
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len(programs), done.stderr
    found: dict[str, dict[int, str]] = {name: {} for name in programs}
    for one in told["generalDiagnostics"]:
        line = one["range"]["start"]["line"] + 1
        found[Path(one["file"]).stem].setdefault(line, one["message"])
    return found


def test_applications_and_recipes_that_are_right_pass(errors: dict[str, dict[int, str]]) -> None:
    assert {name: found for name, found in errors.items() if found and name != "wrong"} == {}


def test_mistakes_are_found(errors: dict[str, dict[int, str]]) -> None:
    wrong = {number for number, line in enumerate(WRONG.splitlines(), 1) if "# error" in line}
    assert set(errors["wrong"]) == wrong
