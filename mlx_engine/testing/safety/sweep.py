"""Each operation of an engine, cancelled in each way, at as many moments as there is time for."""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import InvalidRequest
from mlx_engine.testing.safety.checked_engine import CheckedEngine
from mlx_engine.testing.safety.loop_thread import LoopThread
from mlx_engine.testing.safety.operations import OPERATIONS, Group, Operation
from mlx_engine.testing.safety.plan import Choice, Plan, Strike
from mlx_engine.testing.safety.report import SafetyFailure, SafetyRow
from mlx_engine.testing.safety.stats_check import StatsCheck
from mlx_engine.testing.safety.timeouts import Hang, Timeouts
from mlx_engine.testing.safety.trial import Trial, TrialResult
from mlx_engine.testing.safety.ways import Work

_PATIENCE = 10.0  # seconds that anything may take, besides a multiple of the usual
_USUAL: Final = 20  # that multiple
_FIRST = 600.0  # seconds for what has no usual duration yet
_ENOUGH: Final = 5  # failures after which no more is tried
_UNTIL: Final[dict[Group, float]] = {"files": 0.1, "requests": 0.75, "life": 1.0}


@dataclass
class Tally:
    """Counts of an operation in a way."""

    planned: int
    struck: int = 0
    tried: int = 0
    longest: float | None = None
    failures: int = 0

    def add(self, outcome: TrialResult) -> None:
        """Count a trial."""
        self.struck += outcome.struck
        if outcome.latency is not None:
            self.longest = max(self.longest or 0.0, outcome.latency)


@dataclass
class Sweep:
    """A check of one kind of engine; ``run`` is for a thread of its own.

    Attributes:
        make, prompt, seconds, seed, exact: see ``assert_cancellation_safe``.
        choice: what to try.
        say: is told of the progress.
        timeouts: of the thread.
        tallies: by operation and way.
        failures: in order.
        notes: what was not tried or not compared.
        kind: the engine's class.
        where: what is being tried now.
    """

    make: Callable[[], BaseEngine]
    prompt: str
    seconds: float
    seed: int
    choice: Choice
    exact: bool | None
    say: Callable[[str], None]
    timeouts: Timeouts
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: list[SafetyFailure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str = ""
    where: str = "at the beginning"
    _useless: bool = False

    def run(self) -> None:
        """Try everything that is chosen.

        Raises:
            Hang: something does not come to its end; then nothing more can be tried.
            MLXEngineError: the engine cannot be started, or refuses all requests.
            InvalidRequest: there is no such operation.
        """
        self._thread = LoopThread(self.timeouts)
        with tempfile.TemporaryDirectory() as folder, _garbage_apart(), self._thread.open():
            self._checked = CheckedEngine(self.make(), self.prompt, Path(folder), self.seed)
            self.kind = type(self._checked.engine).__name__
            operations = self.choice.of(OPERATIONS)
            try:
                self._learn()
                self._try(operations)
                self._compared()
                self._ask(self._checked.engine.stop, self._load_seconds, "stop()")
            except BaseException:
                self._let_go()
                raise

    def rows(self) -> tuple[SafetyRow, ...]:
        """Rows of the report so far."""
        return tuple(
            SafetyRow(*names, t.struck, t.tried, t.planned, t.longest, t.failures)
            for names, t in self.tallies.items()
        )

    # Before

    def _learn(self) -> None:
        """Start the engine, and see what it does unharmed."""
        checked = self._checked
        began = time.perf_counter()
        self._thread.run(checked.start, float("inf"), "start()")
        self._load_seconds = time.perf_counter() - began
        checked.exact = checked.engine.width == 1 if self.exact is None else self.exact
        if self._is_done(checked.processed):
            checked.has.add("logits processors")
        if self._is_done(checked.run_deaf):
            checked.has.add("functions")
        answers = []
        for _ in range(3):
            began = time.perf_counter()
            answers.append(self._thread.run(checked.ask, _FIRST, "the first request"))
            self._ask_seconds = time.perf_counter() - began
        # With its prompt in the prompt cache it is computed in other pieces.
        self._cold: tuple[int, ...] | None = answers[0]
        self._warm: tuple[int, ...] | None = answers[2]
        if answers[1] != answers[2]:
            self._cold = self._warm = None
            checked.exact = False
            self.notes.append("Tokens are not compared: one request gives others each time.")
        checked.reference = self._warm

    def _is_done(self, work: Work[Any]) -> bool:
        try:
            self._thread.run(work, _FIRST, "the first request")
        except InvalidRequest:
            return False
        return True

    # The order

    def _try(self, operations: Sequence[Operation]) -> None:
        began, draw = time.monotonic(), random.Random(self.seed)
        for group, share in _UNTIL.items():
            own = [one for one in operations if one.group == group and self._is_possible(one)]
            if not own:
                continue
            if group == "life":
                self._ask(self._checked.engine.stop, self._load_seconds, "stop()")
            end = began + self.seconds * (1.0 if self.choice.operation else share)
            for strike in self._strikes(own, Plan(self.choice, draw), end):
                self._strike(strike)
        if self._enough:
            self.notes.append(f"After {len(self.failures)} failures no more was tried.")

    def _strikes(self, operations: list[Operation], plan: Plan, end: float) -> Iterator[Strike]:
        """Turn after turn, as long as there is time; the first strike in any case."""
        since = 0  # turns without any
        for turn in itertools.count():
            since += 1
            for number, operation in enumerate(operations):
                late = time.monotonic() > end and number + turn > 0
                if self._enough or self.timeouts.leaving.is_set():
                    return
                if late:
                    left = operations[number:] if turn == 0 else []
                    self.notes.extend(f"No {one.name}: no time was left." for one in left)
                    return
                if turn == 0 and (usual := self._measure(operation)) is not None:
                    for way, planned in plan.add(operation, usual).items():
                        self.tallies[operation.name, way] = Tally(planned)
                if (strike := plan.strike(operation, number + turn)) is not None:
                    since = 0
                    yield strike
            if since >= plan.turns:
                return

    def _is_possible(self, operation: Operation) -> bool:
        problem = self._checked.impossible(operation)
        if problem is not None and self.choice.operation is not None:
            raise InvalidRequest("only", f"{operation.name} cannot be tried: {problem}")
        if problem is not None:
            self.notes.append(f"No {operation.name}: {problem}.")
        return problem is None

    def _measure(self, operation: Operation) -> TrialResult | None:
        """Play it unharmed; ``None`` if it cannot be done."""
        self.where = f"{operation.name}, not cancelled"
        try:
            outcome = self._play(operation, Trial(), _FIRST)
        except InvalidRequest as error:
            self.notes.append(f"No {operation.name}: {error}.")
            return None
        except Exception as error:  # noqa: BLE001 - whatever an engine raises
            self._failed(operation, error)
            return None
        self.say(
            f"{operation.name}: {outcome.steps} steps of the event loop, {outcome.seconds:.3f} s"
        )
        return outcome

    @property
    def _enough(self) -> bool:
        return self._useless or len(self.failures) >= _ENOUGH

    # One of them

    def _strike(self, strike: Strike) -> None:
        self.where = str(strike)
        tally = self.tallies[strike.operation.name, strike.way.name]
        tally.tried += 1
        trial = Trial(strike.way(), strike.moment, strike.usual.seconds)
        limit = self._limit(strike.usual.seconds + self._ask_seconds)
        try:
            tally.add(self._play(strike.operation, trial, limit))
        except Hang:
            tally.failures += 1
            raise
        except Exception as error:  # noqa: BLE001 - whatever an engine raises
            tally.failures += 1
            self._failed(strike.operation, error)

    def _play(self, operation: Operation, trial: Trial, limit: float) -> TrialResult:
        """A trial, and what must be true after it."""
        checked = self._checked
        if operation.group == "life":
            return self._play_life(operation, trial, limit + self._limit(2 * self._load_seconds))
        stats = StatsCheck(checked.engine)
        with trial.quietly():
            outcome = self._run(operation, trial, limit)
            checked.overlaps.check()
            self._check_stats(operation, stats, outcome)
        if operation.group == "files":
            self._ask(checked.look_at_file, outcome.seconds, "the next use of the file")
        self._ask(checked.probe, self._ask_seconds, "the next request")
        return outcome

    def _play_life(self, operation: Operation, trial: Trial, limit: float) -> TrialResult:
        """The same of an engine's life: it is stopped before that and after it."""
        checked = self._checked
        if operation.starts:
            checked.engine = self.make()
            around: tuple[Work[Any] | None, Work[Any]] = None, checked.live_on
        else:
            around = checked.start, checked.stop_and_live_on
        checked.reference = self._cold
        try:
            with trial.quietly():
                outcome = self._run(operation, trial, limit, *around)
                if trial.ended:
                    self._thread.run(checked.stop_and_live, limit, "what comes after")
        finally:
            checked.reference = self._warm
            checked.overlaps.forget()
        return outcome

    def _run(
        self,
        operation: Operation,
        trial: Trial,
        limit: float,
        before: Work[Any] | None = None,
        after: Work[Any] | None = None,
    ) -> TrialResult:
        works = self._checked.works(operation)
        return trial.run(self.timeouts, limit, *works, operation.order, before, after)

    def _check_stats(self, operation: Operation, stats: StatsCheck, outcome: TrialResult) -> None:
        beside = operation.beside is not None
        told = (operation.requests if outcome.gave is not None else 0) + outcome.accompanied
        seconds = 2 * outcome.seconds
        with self.timeouts.within(self._limit(seconds), "stats()"):
            if operation.group == "files":
                stats.check(seconds)
            else:
                stats.check(seconds, (told, operation.requests + beside))

    # What all need

    def _failed(self, operation: Operation, error: Exception) -> None:
        """Note it, and go on with another engine."""
        self._note(error)
        checked = self._checked
        self.where = f"{self.where}, and then"
        try:
            self._ask(checked.engine.stop, self._load_seconds, "stop()")
            checked.engine = self.make()
            checked.overlaps.forget()
            if operation.group != "life":
                self._ask(checked.engine.start, self._load_seconds, "start()")
                self._ask(checked.ask, self._ask_seconds, "a request")
        except Exception as another:  # noqa: BLE001 - whatever an engine raises
            self._note(another)
            self._useless = True

    def _note(self, error: Exception) -> None:
        self.failures.append(SafetyFailure.of(self.where, error))
        self.say(f"{self.where}: {self.failures[-1].problem}")

    def _let_go(self) -> None:
        """Stop the engine, if that can be done."""
        try:
            self._thread.run(self._checked.engine.stop, _PATIENCE, "stop()")
        except (Hang, Exception):  # noqa: BLE001 - there is an error on its way already
            pass

    def _ask(self, work: Work[Any], usual: float, what: str) -> Any:
        return self._thread.run(work, self._limit(usual), what)

    @staticmethod
    def _limit(usual: float) -> float:
        return _PATIENCE + _USUAL * usual

    def _compared(self) -> None:
        checked = self._checked
        if checked.compared and not checked.exact:
            self.notes.append(
                f"Of {checked.compared} requests beside others {checked.same} had the tokens that "
                "they have alone; only lengths were checked, see exact."
            )


@contextmanager
def _garbage_apart() -> Iterator[None]:
    """Collecting garbage is done often, and takes no time for what was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
