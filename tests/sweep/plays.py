"""Which operations are played on which engines, and how a sweep goes over one of them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import MTP, BaseEngine, BatchedEngine, DraftModel, SimpleEngine, SpecPrefill
from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.engine import mlx_work
from mlx_engine.generation.cache import cached_model
from mlx_engine.generation.sparse import setup as sparse_setup
from mlx_engine.generation.speculative import setup as speculative_setup
from mlx_engine.generation.trials import mtp_head
from mlx_engine.testing.safety.operations import Operation
from mlx_engine.testing.safety.ways import ALL_WAYS
from tests.conftest import make_tiny
from tests.engine.pools import Again, begin_with
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO
from tests.sweep.elsewhere import Elsewhere
from tests.sweep.operations import PROMPT, SWEPT, SweptEngine
from tests.sweep.scene import LOOP_FIRST, SCHEDULES, Scene, Schedule, Unharmed
from tests.sweep.simulation import Simulation

Options = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Strategy:
    """How tokens are made.

    Attributes:
        options: of an engine, by the model's folder.
        late: see ``SweptEngine``, in an engine of one request at a time and in one with batches.
        long: a long prompt is needed.
        only: the one kind of engine that does it; "" is every one.
    """

    options: Options
    late: tuple[int, int]
    long: bool = False
    only: str = ""


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
    ", preempted": Strategy(lambda _: {}, (1, 6), only="batched"),
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

    @property
    def elsewhere(self) -> bool:
        """Whether it is as if in another process."""
        return self.where.startswith("process")

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
            engine = BatchedEngine(folder, **options)
            preempted = self.strategy == ", preempted"
            return begin_with(engine, lambda: Again(4, rarer=True)) if preempted else engine
        inner = "batched" if self.where == "process, batched" else "simple"
        return Elsewhere(folder, engine=inner, watchdog=None, **options)

    @property
    def late(self) -> int:
        """See ``SweptEngine``; what is told to another process comes there a little later."""
        simple, batched = STRATEGIES[self.strategy].late
        return {"simple": simple, "process": simple + 1}.get(self.where, batched)

    @property
    def prompt(self) -> list[int]:
        """What is asked."""
        if STRATEGIES[self.strategy].long:
            return [1 + 7 * n % 250 for n in range(150)]
        return list(range(1, 41)) if self.caches else PROMPT  # as shorter ones are not stored


@dataclass(frozen=True)
class Play:
    """An operation on a kind of engine."""

    kind: Kind
    operation: Operation

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation.name}"


_MTP = dataclasses.replace(MIMO, config={"num_hidden_layers": 1})
_WHERE = ("simple", "batched", "process", "process, batched")
_OFTEN = (
    "generate, before another",
    "generate, out of time",
    "stream_generate",
    "chat",
    "generate_batch",
)


def _all_plays() -> Iterator[Play]:
    for strategy, where, operation in itertools.product(STRATEGIES, _WHERE, SWEPT):
        kind = Kind(where, strategy, caches=operation.group == "files")
        if STRATEGIES[strategy].only in ("", where) and not (
            kind.elsewhere and operation.need == "functions"
        ):
            yield Play(kind, operation)


def _usual(play: Play) -> bool:
    """Those that are played each time: all, where strategy or process make no other path."""
    kind, operation = play.kind, play.operation
    if operation.name.startswith("sync: ") and operation.name != "sync: generate":
        return kind.where == "simple" and not kind.strategy  # the same threads in all others
    if kind.where == "process, batched" or (kind.strategy and kind.where == "process"):
        return operation.name == "generate, before another"
    if not kind.strategy or operation.name in _OFTEN or operation.group == "files":
        return True
    return kind.where == "simple" and operation.name == "start"


PLAYS = {str(play): play for play in _all_plays()}
# These are played under all schedules each time, the others under one.
_CORE = {
    "simple: generate, before another",
    "simple: generate, out of time",
    "simple: stream_generate",
    "simple: run_blocking",
    "simple: start",
    "simple: stop",
    "batched: generate, before another",
    "batched: generate, out of time",
    "batched: stream_generate",
    "process: generate, before another",
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
    with scene_of(simulation, play, folder) as scene:
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
def scene_of(simulation: Simulation, play: Play, folder: Path) -> Iterator[Scene]:
    """The scene of a play, on an engine that is there as long as the ``with`` block."""
    kind, operation = play.kind, play.operation
    model = folder / ("mtp/converted" if kind.strategy == ", mtp" else "plain")
    make = functools.partial(kind.make, model)
    with loaded_once(simulation):
        swept = SweptEngine(simulation, make, folder, kind.prompt, kind.late)
        if operation.group == "life":
            yield swept.scene(operation)
            return
        simulation.in_a_loop(swept.engine.start)
        try:
            yield swept.scene(operation)
        finally:
            simulation.in_a_loop(swept.engine.stop)


@contextmanager
def loaded_once(simulation: Simulation) -> Iterator[None]:
    """Models and heads are loaded the first time only; a model's load has moments nevertheless.

    What a model says to try its head with is asked once as well: there is no moment in between.
    And where nothing is chosen, as before a play and after it, they are not warmed up, and what
    has been checked of them counts.
    """
    models: dict[Path, Any] = {}
    heads: dict[Path, Any] = {}
    answers: dict[int, Any] = {}

    def load_model(original: Any) -> Any:
        def load(config: Any, path: Path, *, on_progress: Any, should_stop: Any) -> Any:
            for _ in range(2):
                simulation.driver.pause("load")
                if should_stop():
                    raise Interrupted
            if path not in models:
                models[path] = original(config, path, on_progress=None, should_stop=lambda: False)
            return models[path]

        return load

    def load_head(original: Any) -> Any:
        def load(loaded: Any, path: Path | None) -> Any:
            if loaded.path not in heads:
                heads[loaded.path] = original(loaded, path)
            return heads[loaded.path]

        return load

    def ask_once(original: Any) -> Any:
        def ask(parts: Any, prompt: Any, eos: Any) -> Any:
            checkpoint()
            if id(parts.model) not in answers:  # which is kept in ``models``
                answers[id(parts.model)] = original(parts, prompt, eos)
            return answers[id(parts.model)]

        return ask

    def in_plays(original: Any) -> Any:
        def warm_up(*args: Any, **options: Any) -> None:
            if not simulation.driver.quick:
                original(*args, **options)

        return warm_up

    def once_but_in_plays(original: Any) -> Any:
        known: dict[int, Any] = {}

        def check(model: Any, *args: Any) -> Any:
            if not simulation.driver.quick or id(model) not in known:
                known[id(model)] = original(model, *args)
            return known[id(model)]

        return check

    instead = (
        (mlx_work, "load_model", load_model),
        (mlx_work, "warm_up", in_plays),
        (speculative_setup, "load_head", load_head),
        (mtp_head, "_greedy", ask_once),
        (speculative_setup, "check_rollback", once_but_in_plays),
        (speculative_setup, "check_head", once_but_in_plays),
        (sparse_setup, "check_sparse", once_but_in_plays),
        (cached_model, "measure_kv", once_but_in_plays),
        (mlx_work, "check_batchable", once_but_in_plays),
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module, name, wrapped in instead:
                patch.setattr(module, name, wrapped(getattr(module, name)))
            yield
    finally:
        for loaded in (heads, models):
            simulation.on_mlx_thread(loaded.clear)  # they go where they were made


def make_models(folder: Path) -> None:
    """Write the models of all plays; before threads are driven."""
    make_tiny(folder / "plain", "0", "--layers", "1")
    asyncio.run(made(_MTP, folder / "mtp"))
