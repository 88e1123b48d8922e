"""The way of one ``generate()`` through the package, which is to become shorter, never longer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

# At most so many: files with a call in them, frames of coroutines to the drain, files that are
# entered twice on the way in.
LIMITS = {
    "SimpleEngine": (44, 3, 1),
    "BatchedEngine": (48, 3, 1),
    "ProcessEngine": (64, 3, 0),
}


@pytest.fixture(scope="module")
def ways() -> dict[str, Any]:
    """In a process of its own, where nothing else goes on."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.way", "--json"]
    ways: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT))
    return ways


@pytest.mark.parametrize("kind", LIMITS)
def test_the_way_in_is_no_longer_than_it_may_be(ways: dict[str, Any], kind: str) -> None:
    way = ways[kind]
    files, frames, twice = LIMITS[kind]
    assert len(way["files"]) <= files, way["files"]
    assert len(way["frames"]) <= frames, way["frames"]
    assert len(way["twice"]) <= twice, way["twice"]
