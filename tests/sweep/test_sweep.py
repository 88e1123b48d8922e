"""Every operation, cancelled at every moment, in every way, under several schedules.

A moment is the point before a step of the event loop or before a thread goes on. First an
operation is played unharmed, to count its moments; then again and again, struck at the first,
the second, and so on. After each run the invariants are checked, and the engine has to serve the
next request with the right tokens.

    python -m tests.sweep "simple: generate, before another" "Task.cancel twice" "in turn" 17 0

plays one run again, by what a failure has printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.memory.machines import machine_of
from tests.sweep.plays import ASKED, CASES, Play, make_models, sweep
from tests.sweep.scene import Schedule
from tests.sweep.simulation import Simulation

pytestmark = [
    # Of the plays that must be asked for, those that start MTP engines take minutes.
    pytest.mark.timeout(3600 if ASKED else 900),
    # When an event loop is closed, streams that are in no "async with" warn, and so do the
    # coroutines of tasks that have not begun.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    make_models(folder)
    return folder


@pytest.fixture
def simulation(folder: Path) -> Iterator[Simulation]:
    # What is elsewhere is here as well: a ledger would count its memory twice.
    with machine_of(None), Simulation().installed() as simulation:
        yield simulation


@pytest.mark.parametrize(
    ("play", "schedule"), CASES, ids=[f"{play}, {schedule.name}" for play, schedule in CASES]
)
def test_every_moment_and_every_way(
    simulation: Simulation,
    play: Play,
    schedule: Schedule,
    folder: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("interleavings", sweep(simulation, play, schedule, folder))
