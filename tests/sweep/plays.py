"""Which operations are played on which engines, and how a sweep goes over one of them."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    EngineState,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.engine import slot
from mlx_engine.engine.local import LocalEngine
from mlx_engine.testing.safety.endings import ALL_WAYS
from mlx_engine.turn import Interrupted
from tests.conftest import make_tiny
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO
from tests.sweep.elsewhere import Elsewhere
from tests.sweep.operations import Stage, requests
from tests.sweep.scene import LOOP_FIRST, SCHEDULES, Scene, Schedule, Unharmed
from tests.sweep.simulation import Simulation

LONG = [1 + 7 * n % 250 for n in range(150)]
SMALL: dict[str, Any] = {"prefill_step_size": 8, "prompt_cache_bytes": 0}
WIDE: dict[str, Any] = {"prefill_step_size": 64, "prompt_cache_bytes": 0}


@dataclass(frozen=True)
class Kind:
    """A kind of engine.

    Attributes:
        make: makes one, of the model in a folder.
        late: see ``Stage``.
    """

    name: str
    make: Callable[[Path], BaseEngine]
    late: int = 1
    prompt: tuple[int, ...] | None = None
    mtp: bool = False


def _sparse(folder: Path) -> SpecPrefill:
    return SpecPrefill(folder, keep=0.5, threshold=64)


SIMPLE = Kind("simple", lambda f: SimpleEngine(f, **SMALL))
BATCHED = Kind("batched", lambda f: BatchedEngine(f, **SMALL), late=4)
CACHING = Kind(
    "simple, caching", lambda f: SimpleEngine(f, prefill_step_size=8), prompt=(*range(1, 41),)
)
CACHING_BATCHED = Kind(
    "batched, caching", lambda f: BatchedEngine(f, prefill_step_size=8), prompt=(*range(1, 41),)
)
PROCESS = Kind("process", lambda f: Elsewhere(f, watchdog=None, **SMALL), late=2)
PROCESS_BATCHED = Kind(
    "process, batched", lambda f: Elsewhere(f, engine="batched", watchdog=None, **SMALL), late=4
)
STRATEGIES = [
    Kind("simple, draft", lambda f: SimpleEngine(f, decode=DraftModel(f, 2), **SMALL), 5),
    Kind("batched, draft", lambda f: BatchedEngine(f, decode=DraftModel(f, 2), **SMALL), 8),
    Kind("simple, mtp", lambda f: SimpleEngine(f, decode=MTP(2), **SMALL), 5, mtp=True),
    Kind("batched, mtp", lambda f: BatchedEngine(f, decode=MTP(2), **SMALL), 8, mtp=True),
    Kind("simple, specprefill", lambda f: SimpleEngine(f, prefill=_sparse(f), **WIDE), 2, (*LONG,)),
    Kind(
        "batched, specprefill", lambda f: BatchedEngine(f, prefill=_sparse(f), **WIDE), 5, (*LONG,)
    ),
]


@dataclass(frozen=True)
class Play:
    """An operation on a kind of engine."""

    kind: Kind
    operation: str

    def __str__(self) -> str:
        return f"{self.kind.name}: {self.operation}"


_EVERYWHERE = ("generate", "generate, behind", "stream", "bare stream", "chat", "batch")
REQUESTS = [
    *(Play(kind, name) for kind in (SIMPLE, BATCHED, PROCESS) for name in _EVERYWHERE),
    *(Play(kind, "stream chat left early") for kind in (SIMPLE, BATCHED, PROCESS)),
    *(Play(kind, name) for kind in (SIMPLE, BATCHED) for name in ("run blocking", "run deaf")),
    *(Play(kind, "generate") for kind in (PROCESS_BATCHED,)),
    *(Play(kind, name) for kind in STRATEGIES for name in ("generate", "stream")),
    *(Play(kind, name) for kind in (CACHING, CACHING_BATCHED) for name in ("save", "load")),
]
_LIVES = ("start", "start, twice", "whole life", "stop", "drain", "drain a while")
LIVES = [Play(kind, name) for kind in (SIMPLE, BATCHED, PROCESS) for name in _LIVES]
# These are played under all schedules, the others under one; MLX_ENGINE_SWEEP=all plays all.
_CORE = {
    "simple: generate",
    "simple: stream",
    "simple: run blocking",
    "simple: start",
    "simple: stop",
    "batched: generate",
    "batched: stream",
    "process: generate",
}
CASES = [
    (play, schedule)
    for play in (*REQUESTS, *LIVES)
    for schedule in SCHEDULES
    if schedule is LOOP_FIRST or str(play) in _CORE or os.environ.get("MLX_ENGINE_SWEEP") == "all"
]
PLAYS = {str(play): play for play in (*REQUESTS, *LIVES)}


def sweep(simulation: Simulation, play: Play, schedule: Schedule, folder: Path) -> int:
    """Play it unharmed, and then struck at every moment, in every way; the number of runs."""
    before = Simulation.runs
    with on_stage(simulation, play, folder) as scene:
        moments = simulation.play(scene, Unharmed(), schedule)
        for way in ALL_WAYS:
            for moment in range(1, moments + 1):
                try:
                    simulation.play(scene, way(), schedule, moment)
                except BaseException as error:
                    error.add_note(
                        f'again: python -m tests.sweep "{play}" "{way.name}" "{schedule.name}" '
                        f"{moment} 0"
                    )
                    raise
    return Simulation.runs - before


@contextmanager
def on_stage(simulation: Simulation, play: Play, folder: Path) -> Iterator[Scene]:
    """The scene of a play, on an engine that is there as long as the ``with`` block."""
    model = folder / ("mtp/converted" if play.kind.mtp else "plain")
    with loaded_once(simulation):
        stage = Stage(
            simulation, functools.partial(play.kind.make, model), folder, late=play.kind.late
        )
        if play.kind.prompt is not None:
            stage.prompt = list(play.kind.prompt)
        if play.operation in _LIVES:
            yield _life(stage, play.operation)
            return
        simulation.in_a_loop(stage.engine.start)
        try:
            if play.operation in ("save", "load"):
                yield _cache_file(stage, play.operation)
            else:
                yield requests(stage, play.operation)[play.operation]
        finally:
            simulation.in_a_loop(stage.engine.stop)


def _life(stage: Stage, operation: str) -> Scene:
    states = EngineState
    probe = stage.life_probe
    if operation in ("start", "start, twice"):
        return Scene(
            operation,
            stage.start,
            beside=stage.start_too if operation == "start, twice" else None,
            reset=stage.new_engine,
            rested=stage.in_state(states.CREATED, states.RUNNING, states.STOPPED),
            probe=probe,
            late=8,  # whether the model can be batched is tried at the end of a start
            lives=True,
        )
    if operation == "whole life":
        return Scene(
            operation,
            stage.whole_life,
            reset=stage.new_engine,
            rested=stage.in_state(states.CREATED, states.STOPPED),
            probe=probe,
            lives=True,
            late=8,
        )
    return Scene(
        operation,
        getattr(stage, operation.replace(" ", "_")),
        beside=stage.other_or_stopped,
        behind=True,
        reset=stage.new_running_engine,
        rested=stage.in_state(states.STOPPED, states.RUNNING),
        probe=probe,
        late=4,
        lives=True,
    )


def _cache_file(stage: Stage, operation: str) -> Scene:
    engine = stage.engine
    assert isinstance(engine, LocalEngine)
    saved = stage.folder / "saved"

    async def fill() -> None:
        await stage.generate()
        await stage.other()

    simulation = stage.simulation
    simulation.in_a_loop(fill)
    in_file = simulation.in_a_loop(lambda: engine.save_prompt_cache(saved))

    def reset() -> None:
        simulation.in_a_loop(lambda: engine.run_blocking(engine._slot.space().prompt_cache.clear))
        simulation.in_a_loop(stage.generate)
        (stage.folder / "cache").unlink(missing_ok=True)

    def rested() -> None:
        stage.rested()
        left = {file.name for file in stage.folder.iterdir() if file.is_file()}
        assert left <= {"saved", "cache"}, left
        # What was there, perhaps what is in the file, and perhaps what the probe has asked.
        entries = engine.stats().prompt_cache.entries
        assert 1 <= entries <= in_file + 1, (entries, in_file)

    return Scene(
        operation,
        getattr(stage, operation),
        reset=reset,
        rested=rested,
        probe=stage.probe,
    )


@contextmanager
def loaded_once(simulation: Simulation) -> Iterator[None]:
    """Models are loaded the first time only; each load has its moments nevertheless."""
    load, models = slot.load_model, {}

    def load_once(config: Any, path: Path, *, on_progress: Any, should_stop: Any) -> Any:
        for _ in range(2):
            simulation.driver.pause("load")
            if should_stop():
                raise Interrupted
        if path not in models:
            models[path] = load(config, path, on_progress=None, should_stop=lambda: False)
        return models[path]

    slot.load_model = load_once
    try:
        yield
    finally:
        slot.load_model = load
        # They go where they were made.
        simulation.on_mlx_thread(models.clear)


def make_models(folder: Path) -> None:
    """Write the models of all plays; before threads are driven."""
    make_tiny(folder / "plain", "0", "--layers", "1")
    asyncio.run(made(MIMO, folder / "mtp"))
