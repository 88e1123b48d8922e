"""Which operations are played on which engines, and how a sweep goes over one of them."""

from __future__ import annotations

import asyncio
import dataclasses
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
from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.engine import mlx_work
from mlx_engine.generation.cache import cached_model
from mlx_engine.generation.sparse import setup as sparse_setup
from mlx_engine.generation.speculative import setup as speculative_setup
from mlx_engine.generation.trials import mtp_head
from mlx_engine.testing.safety.endings import ALL_WAYS
from tests.conftest import make_tiny
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO
from tests.sweep.elsewhere import Elsewhere
from tests.sweep.operations import Stage, engine_here, requests
from tests.sweep.scene import LOOP_FIRST, SCHEDULES, Scene, Schedule, Unharmed
from tests.sweep.simulation import Simulation

Options = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Strategy:
    """How tokens are made.

    Attributes:
        options: of an engine, by the model's folder.
        late: see ``Stage``, in an engine of one request at a time and in one with batches.
        long: a long prompt is needed.
    """

    options: Options
    late: tuple[int, int]
    long: bool = False


STRATEGIES = {
    "": Strategy(lambda _: {}, (1, 4)),
    ", draft": Strategy(lambda folder: {"decode": DraftModel(folder, 2)}, (5, 8)),
    ", mtp": Strategy(lambda _: {"decode": MTP(2)}, (5, 8)),
    ", specprefill": Strategy(
        lambda folder: {
            "prefill": SpecPrefill(folder, keep=0.5, threshold=64),
            "prefill_step_size": 64,
        },
        (2, 5),
        long=True,
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind of engine.

    Attributes:
        where: "simple", "batched", or the same in a process.
        strategy: a key of ``STRATEGIES``.
        caches: it has a prompt cache.
    """

    where: str
    strategy: str = ""
    caches: bool = False

    def __str__(self) -> str:
        return f"{self.where}{self.strategy}{', caching' * self.caches}"

    def make(self, folder: Path) -> BaseEngine:
        """An engine with the model in this folder."""
        options: dict[str, Any] = {"prefill_step_size": 8}
        options |= STRATEGIES[self.strategy].options(folder)
        if not self.caches:
            options["prompt_cache_bytes"] = 0
        if self.where == "simple":
            return SimpleEngine(folder, **options)
        if self.where == "batched":
            return BatchedEngine(folder, **options)
        inner = "batched" if self.where == "process, batched" else "simple"
        return Elsewhere(folder, engine=inner, watchdog=None, **options)

    @property
    def late(self) -> int:
        """See ``Stage``; what is told to another process comes there a little later."""
        simple, batched = STRATEGIES[self.strategy].late
        return {"simple": simple, "process": simple + 1}.get(self.where, batched)

    @property
    def prompt(self) -> list[int] | None:
        """What is asked, if that matters."""
        if STRATEGIES[self.strategy].long:
            return [1 + 7 * n % 250 for n in range(150)]
        return list(range(1, 41)) if self.caches else None  # as shorter ones are not stored


@dataclass(frozen=True)
class Play:
    """An operation on a kind of engine."""

    kind: Kind
    operation: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation}"


_MTP = dataclasses.replace(MIMO, config={"num_hidden_layers": 1})
_WHERE = ("simple", "batched", "process", "process, batched")
_REQUESTS = (
    *("generate", "generate, behind", "stream", "bare stream", "chat", "batch"),
    "stream chat left early",
)
_FUNCTIONS = ("run blocking", "run deaf")
_FILES = ("save", "load")
_LIVES = ("start", "start, twice", "whole life", "stop", "drain", "drain a while")


def _all_plays() -> Iterator[Play]:
    for strategy in STRATEGIES:
        for where in _WHERE:
            kind, caching = Kind(where, strategy), Kind(where, strategy, caches=True)
            functions = () if where.startswith("process") else _FUNCTIONS
            yield from (Play(kind, name) for name in (*_REQUESTS, *functions, *_LIVES))
            yield from (Play(caching, name) for name in _FILES)


def _usual(play: Play) -> bool:
    """Those that are played each time: all, where strategy or process make no other path."""
    kind = play.kind
    if kind.where == "process, batched" or (kind.strategy and kind.where == "process"):
        return play.operation == "generate"
    if not kind.strategy or play.operation in ("generate", "stream", "chat", "batch", *_FILES):
        return True
    return kind.where == "simple" and play.operation == "start"


PLAYS = {str(play): play for play in _all_plays()}
# These are played under all schedules each time, the others under one.
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
# "plays": every play; "all": every one under every schedule.
ASKED = os.environ.get("MLX_ENGINE_SWEEP", "")
CASES = [
    (play, schedule)
    for play in PLAYS.values()
    for schedule in SCHEDULES
    if ASKED == "all"
    or ((ASKED == "plays" or _usual(play)) and (schedule is LOOP_FIRST or str(play) in _CORE))
]


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
    kind = play.kind
    model = folder / ("mtp/converted" if kind.strategy == ", mtp" else "plain")
    with loaded_once(simulation):
        stage = Stage(simulation, functools.partial(kind.make, model), folder, late=kind.late)
        stage.prompt = kind.prompt or stage.prompt
        if play.operation in _LIVES:
            yield _life(stage, play.operation)
            return
        simulation.in_a_loop(stage.engine.start)
        try:
            if play.operation in _FILES:
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
            late=3,
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
            late=3,
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
    saved = stage.folder / "saved"

    async def fill() -> None:
        await stage.generate()
        await stage.other()

    simulation = stage.simulation
    simulation.in_a_loop(fill)
    in_file = simulation.in_a_loop(lambda: stage.engine.save_prompt_cache(saved))
    engine = engine_here(stage.engine)

    def reset() -> None:
        simulation.on_mlx_thread(engine._holder.runner().prompt_cache.clear)
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
    """Models and heads are loaded the first time only; a model's load has moments nevertheless.

    What a model says to try its head with is asked once as well: there is no moment in between.
    And where nothing is chosen, as before a play and after it, they are not warmed up, and what
    has been checked of them counts.
    """
    load, models = mlx_work.load_model, {}
    load_head, heads = speculative_setup.load_head, {}
    ask, answers = mtp_head._greedy, {}
    warm_up = mlx_work.warm_up
    checks = [
        (speculative_setup, "check_rollback"),
        (speculative_setup, "check_head"),
        (sparse_setup, "check_sparse"),
        (cached_model, "measure_kv"),
        (mlx_work, "check_batchable"),
    ]
    originals = [getattr(module, name) for module, name in checks]

    def load_once(config: Any, path: Path, *, on_progress: Any, should_stop: Any) -> Any:
        for _ in range(2):
            simulation.driver.pause("load")
            if should_stop():
                raise Interrupted
        if path not in models:
            models[path] = load(config, path, on_progress=None, should_stop=lambda: False)
        return models[path]

    def load_head_once(loaded: Any, path: Path | None) -> Any:
        if loaded.path not in heads:
            heads[loaded.path] = load_head(loaded, path)
        return heads[loaded.path]

    def ask_once(parts: Any, prompt: Any, eos: Any) -> Any:
        checkpoint()
        if id(parts.model) not in answers:  # which is kept in ``models``
            answers[id(parts.model)] = ask(parts, prompt, eos)
        return answers[id(parts.model)]

    def warm_up_in_plays(runner: Any, *, batched: bool) -> None:
        if not simulation.driver.quick:
            warm_up(runner, batched=batched)

    def once_but_in_plays(check: Callable[..., Any]) -> Callable[..., Any]:
        known: dict[int, Any] = {}

        def checked(model: Any, *args: Any) -> Any:
            if not simulation.driver.quick or id(model) not in known:
                known[id(model)] = check(model, *args)
            return known[id(model)]

        return checked

    mlx_work.load_model, speculative_setup.load_head = load_once, load_head_once
    mtp_head._greedy, mlx_work.warm_up = ask_once, warm_up_in_plays
    for (module, name), check in zip(checks, originals, strict=True):
        setattr(module, name, once_but_in_plays(check))
    try:
        yield
    finally:
        mlx_work.load_model, speculative_setup.load_head = load, load_head
        mtp_head._greedy, mlx_work.warm_up = ask, warm_up
        for (module, name), check in zip(checks, originals, strict=True):
            setattr(module, name, check)
        for loaded in (heads, models):
            simulation.on_mlx_thread(loaded.clear)  # they go where they were made


def make_models(folder: Path) -> None:
    """Write the models of all plays; before threads are driven."""
    make_tiny(folder / "plain", "0", "--layers", "1")
    asyncio.run(made(_MTP, folder / "mtp"))
