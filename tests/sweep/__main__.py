"""Plays one run again: ``python -m tests.sweep PLAY WAY SCHEDULE MOMENT SEED``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mlx_engine.testing.safety.ways import ALL_WAYS
from tests.guard import GUARD
from tests.memory.machines import machine_of
from tests.sweep.plays import PLAYS, make_models, scene_of
from tests.sweep.scene import SCHEDULES, Unharmed
from tests.sweep.simulation import Simulation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("play", choices=PLAYS)
parser.add_argument("way", choices=[way.name for way in ALL_WAYS])
parser.add_argument("schedule", choices=[schedule.name for schedule in SCHEDULES])
parser.add_argument("moment", type=int)
parser.add_argument("seed", type=int)
options = parser.parse_args()

GUARD.install()
schedule = next(each for each in SCHEDULES if each.name == options.schedule)
way = next(each for each in ALL_WAYS if each.name == options.way)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    make_models(folder)
    with (
        machine_of(None),
        Simulation().installed() as simulation,
        scene_of(simulation, PLAYS[options.play], folder) as scene,
    ):
        moments = simulation.play(scene, Unharmed(), schedule, seed=options.seed)
        simulation.play(scene, way(), schedule, options.moment, options.seed)
print(f"all is well; there are {moments} moments")
