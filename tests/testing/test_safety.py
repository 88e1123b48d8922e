"""``assert_cancellation_safe``: engines that are, and engines that are not."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineStats,
    InvalidRequest,
    ModelLoadError,
    ProcessEngine,
    SimpleEngine,
)
from mlx_engine.testing import (
    FakeEngine,
    NotCancellationSafe,
    SafetyReport,
    assert_cancellation_safe,
)
from mlx_engine.testing.safety import stats_check, sweep, timeouts, trial
from mlx_engine.testing.safety.ways import ALL_WAYS
from tests.conftest import make_tiny
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "0")


def limits(monkeypatch: pytest.MonkeyPatch, patience: float, rest: float) -> None:
    monkeypatch.setattr(sweep, "_PATIENCE", patience)
    monkeypatch.setattr(timeouts, "_GRACE", rest)
    for module in (stats_check, trial):
        monkeypatch.setattr(module, "_REST", rest)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is found to hang because the machine is busy."""
    limits(monkeypatch, PATIENCE, PATIENCE)


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What never ends is told soon."""
    limits(monkeypatch, 3.0, 0.5)


def check(make: Callable[[], BaseEngine], **options: Any) -> SafetyReport:
    return assert_cancellation_safe(make, report=None, **options)


def fails(make: Callable[[], BaseEngine], **options: Any) -> SafetyReport:
    """The report of an engine that is not safe."""
    with pytest.raises(NotCancellationSafe) as caught:
        check(make, **options)
    report = caught.value.report
    assert report.failures
    assert report.failures[0].problem in str(caught.value)
    return report


# ── engines that are safe ───────────────────────────────────────────────────────────────────

EVERYTHING = {
    *("save_prompt_cache", "load_prompt_cache", "generate", "generate, behind another"),
    *("generate, before another", "stream_generate", "stream_generate, bare"),
    *("stream_generate, left early", "chat", "generate_batch", "map"),
    *("count_tokens", "render_chat"),
    *("logits processor", "run_blocking", "run_blocking, deaf"),
    *("sync: generate", "sync: stream_generate", "sync: with"),
    *("start", "async with", "stop", "shutdown"),
}


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine])
def test_engines_in_this_process_are_safe(kind: Any, tiny: Path) -> None:
    report = check(lambda: kind(tiny, prefill_step_size=16), seconds=6, exact=True)
    assert not report.failures
    tried = {row.operation for row in report.rows if row.tried}
    late = {name for name in EVERYTHING for note in report.notes if note.startswith(f"No {name}: ")}
    assert tried | late == EVERYTHING
    assert tried >= {"save_prompt_cache", "generate, before another", "stop"}
    assert 0 < report.struck <= report.tried < report.planned
    assert report.engine == kind.__name__
    assert {row.way for row in report.rows} == {way.name for way in ALL_WAYS}


def test_an_engine_elsewhere_is_safe_and_what_it_refuses_is_told(tiny: Path) -> None:
    report = check(lambda: ProcessEngine(tiny, engine="batched"), seconds=3)
    tried = {row.operation for row in report.rows if row.tried}
    assert tried >= {"save_prompt_cache", "generate, before another", "stop"}
    notes = "\n".join(report.notes)
    assert "No run_blocking: the engine runs no functions of others." in notes
    assert "No logits processor: " in notes
    assert "requests beside others" in notes, "in a batch, lengths are compared"


@pytest.mark.parametrize("width", [1, 4])
def test_a_fake_engine_is_safe_at_every_moment_of_every_way(width: int) -> None:
    said: list[str] = []
    report = assert_cancellation_safe(
        lambda: FakeEngine("Hello there, you!", max_batch_size=width, seconds_per_token=0.0005),
        seconds=10 * PATIENCE,
        only="generate, before another",
        report=said.append,
    )
    assert report.tried == report.planned
    assert all(row.struck for row in report.rows)
    assert said[0].startswith("generate, before another: ")
    assert said[-1] == str(report)
    assert "| generate, before another |" in said[-1]


def test_the_same_seed_draws_the_same_moments_and_time_is_kept() -> None:
    began = time.monotonic()
    report = check(lambda: FakeEngine(seconds_per_token=0.001), seconds=1, seed=3)
    assert report.tried < report.planned
    assert time.monotonic() - began < 30
    assert report.seed == 3


@pytest.mark.demo
def test_the_demo_model_is_safe() -> None:
    report = check(lambda: SimpleEngine("demo", prefill_step_size=16), seconds=10)
    tried = {row.operation for row in report.rows if row.tried}
    assert tried >= {"save_prompt_cache", "generate, before another", "stop"}


# ── engines that are not ────────────────────────────────────────────────────────────────────


class Broken(FakeEngine):
    """Does something wrong once a request has been cancelled."""

    def __init__(self) -> None:
        super().__init__("Hello there, you!", seconds_per_token=0.001)

    async def generate(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().generate(*args, **options)
        except asyncio.CancelledError:
            await self.cancelled()
            raise

    async def cancelled(self) -> None:
        """What it does."""


def test_one_that_swallows_a_cancellation_is_found_and_how_to_see_it_again() -> None:
    class Swallows(Broken):
        async def generate(self, *args: Any, **options: Any) -> Any:
            task = asyncio.ensure_future(super().generate(*args, **options))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                return await task  # a result for a caller that was cancelled

    report = fails(Swallows, only="generate", seconds=PATIENCE)
    assert "the outcome is not honest" in report.failures[0].problem
    where = report.failures[0].where
    assert where.startswith("generate / ")
    assert f'only="{where}"' in str(report)
    again = fails(Swallows, only=where, seconds=PATIENCE)
    assert {failure.where for failure in again.failures} == {where}
    assert sum(row.failures for row in again.rows) == len(again.failures) == 5
    assert "After 5 failures no more was tried." in again.notes


def test_one_that_leaves_a_task_is_found(impatient: None) -> None:
    class Leaks(Broken):
        async def cancelled(self) -> None:
            self.task = asyncio.create_task(asyncio.sleep(3600), name="the leak")

    report = fails(Leaks, only="generate / Task.cancel", seconds=5)
    assert "tasks are left in the event loop: the leak" in report.failures[0].problem


def test_one_that_keeps_what_waited_in_a_closed_loop_is_found(impatient: None) -> None:
    kept: set[Any] = set()

    class Keeps(FakeEngine):
        async def generate(self, *args: Any, **options: Any) -> Any:
            kept.add(asyncio.current_task())
            return await super().generate(*args, **options)

    report = fails(lambda: Keeps(seconds_per_token=0.001), only="generate / loop closed", seconds=5)
    assert "kept alive after its end" in report.failures[0].problem


def test_one_whose_errors_nobody_sees_is_found() -> None:
    class Loses(Broken):
        async def cancelled(self) -> None:
            asyncio.get_running_loop().create_future().set_exception(OSError("lost"))

    report = fails(Loses, only="generate / Task.cancel", seconds=5)
    assert "nobody handled" in report.failures[0].problem
    assert "lost" in report.failures[0].problem


def test_one_that_hangs_is_found_with_the_stacks(impatient: None) -> None:
    class Hangs(Broken):
        async def cancelled(self) -> None:
            await asyncio.get_running_loop().create_future()

    report = fails(Hangs, only="generate / Task.cancel", seconds=5)
    (failure,) = report.failures
    assert "has not come to its end" in failure.problem
    assert "in cancelled" in failure.details, "the stack of the task"
    assert "thread mlx" in failure.details
    assert failure.where.startswith("generate / Task.cancel / ")


def test_one_that_blocks_the_event_loop_is_found(impatient: None) -> None:
    release = threading.Event()

    class Blocks(Broken):
        async def cancelled(self) -> None:
            release.wait()

    try:
        report = fails(Blocks, only="generate / Task.cancel", seconds=5)
    finally:
        release.set()
    (failure,) = report.failures
    assert "has not come to its end" in failure.problem
    assert "release.wait()" in failure.details


def test_one_that_gives_wrong_tokens_afterwards_is_found() -> None:
    class Confused(Broken):
        confused = False

        async def cancelled(self) -> None:
            self.confused = True

        async def generate(self, *args: Any, **options: Any) -> Any:
            result = await super().generate(*args, **options)
            return replace(result, tokens=result.tokens[::-1]) if self.confused else result

    report = fails(Confused, only="generate / TaskGroup", seconds=5)
    assert "the next request gave the tokens" in report.failures[0].problem


def test_one_that_spoils_the_request_beside_it_is_found() -> None:
    class Spoils(Broken):
        spoilt = False

        async def cancelled(self) -> None:
            self.spoilt = True

        async def generate(self, *args: Any, **options: Any) -> Any:
            result = await super().generate(*args, **options)
            spoilt, self.spoilt = self.spoilt, False
            return replace(result, tokens=result.tokens[::-1]) if spoilt else result

    report = fails(Spoils, only="generate, before another / Task.cancel", seconds=5)
    assert any("a request beside it gave" in failure.problem for failure in report.failures)


def test_one_that_never_comes_to_rest_is_found(impatient: None) -> None:
    class Restless(Broken):
        left = 0

        async def cancelled(self) -> None:
            self.left = 1

        def stats(self) -> EngineStats:
            stats = super().stats()
            return replace(stats, running=stats.running + self.left)

    report = fails(Restless, only="generate / asyncio.timeout", seconds=5)
    assert "stats() has 1 running" in report.failures[0].problem


def test_one_that_counts_a_request_twice_is_found(impatient: None) -> None:
    class Miscounts(Broken):
        more = 0

        async def cancelled(self) -> None:
            self.more += 3

        def stats(self) -> EngineStats:
            stats = super().stats()
            return replace(stats, cancelled=stats.cancelled + self.more)

    report = fails(Miscounts, only="generate / Task.cancel", seconds=5)
    assert "of 1 requests, of which 0 gave a result" in report.failures[0].problem


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def test_one_that_releases_its_lock_early_is_found(executor: ThreadPoolExecutor) -> None:
    class Early(Broken):
        calls = 0

        async def run_blocking(
            self, func: Callable[..., Any], /, *args: Any, on_cancel: Any = None, **kwargs: Any
        ) -> Any:
            self.calls += 1
            return await asyncio.wrap_future(executor.submit(func, *args, **kwargs))

        def stats(self) -> EngineStats:
            stats = super().stats()
            return replace(stats, finished=stats.finished + self.calls)

    report = fails(Early, only="run_blocking, deaf", seconds=5)
    assert re.search(
        r"its caller was told while function \d+ was inside MLX|two were inside MLX at once",
        "\n".join(failure.problem for failure in report.failures),
    )


def test_one_that_tells_a_caller_before_its_request_is_out_is_found(tiny: Path) -> None:
    class Hasty(SimpleEngine):
        async def generate(self, *args: Any, **options: Any) -> Any:
            task = asyncio.ensure_future(super().generate(*args, **options))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                task.cancel()
                raise

    report = fails(lambda: Hasty(tiny), only="logits processor", seconds=20)
    problem = report.failures[0].problem
    assert "its caller was told while request" in problem or "work went on inside MLX" in problem


def test_one_that_cannot_be_started_again_is_found() -> None:
    class Once(Broken):
        tried = False

        async def start(self) -> None:
            if self.tried:
                raise OSError("this one has been started before")
            self.tried = True
            await super().start()

    report = fails(Once, only="start", seconds=5)
    assert "it raised OSError: this one has been started before" in report.failures[0].problem
    assert "Traceback" in report.failures[0].details


# ── what it is asked ────────────────────────────────────────────────────────────────────────


def test_a_model_that_cannot_be_loaded_is_no_failure_of_the_check() -> None:
    with pytest.raises(ModelLoadError, match="there/is/none"):
        check(lambda: SimpleEngine("./there/is/none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds: must be a number of seconds, above 0"),
        ({"only": "sing"}, "only: there is no operation 'sing', only 'save_prompt_cache'"),
        ({"only": "generate / politely"}, "only: there is no way 'politely', only 'Task.cancel'"),
        ({"only": "generate / TaskGroup / soon"}, "only: a moment is 'step 3' or '40%'"),
        ({"only": "logits processor"}, "only: logits processor cannot be tried"),
    ],
)
def test_what_cannot_be_tried_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        check(FakeEngine, **options)


@pytest.mark.anyio
async def test_it_does_not_block_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match=r"asyncio\.to_thread"):
        check(FakeEngine)
    report = await asyncio.to_thread(check, FakeEngine, only="generate / Task.cancel", seconds=1)
    assert report.struck


def test_an_engine_that_never_says_the_same_is_not_compared() -> None:
    answers = (f"one two three {number}" for number in range(10_000))
    report = check(lambda: FakeEngine(answers), only="generate / Task.cancel", seconds=5)
    assert "Tokens are not compared: one request gives others each time." in report.notes
