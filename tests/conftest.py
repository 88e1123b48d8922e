"""Fixtures: a two-layer random model in a real folder, loaded by the real loader."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import mlx_engine.models  # noqa: F401 - imports mlx_lm in the one way that does no harm
from mlx_engine import BaseEngine, BatchedEngine, SimpleEngine
from mlx_engine.core import preparer, pressure
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.pressure import Level
from mlx_engine.core.work import PendingWork, ThreadJob
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.engine.late import import_mlx
from tests.guard import GUARD, Gate
from tests.tiny import main
from tests.waiting import PATIENCE, turns, until, until_now

ROOT = Path(__file__).parent.parent

import_mlx()  # not by the first engine that a test starts
GUARD.install()


class _Modules(LoadScopeScheduling):
    """What stays together with ``pytest -n``: modules, whose tests share what is dear to make.

    There is one Ray cluster. The sweep is long and shares little: its tests go one by one.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        if "/sweep/" in module:
            return nodeid
        return "ray" if "/test_ray_" in module else module


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start import faster, as ``children/sitecustomize.py`` says."""
    if "MLX_ENGINE_TEST_IMPORTS" in os.environ:
        return  # by the process that has started this one
    folder = tempfile.mkdtemp(prefix="mlx-engine-imports-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["MLX_ENGINE_TEST_IMPORTS"] = folder
    paths = [str(ROOT / "tests" / "children"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Modules:
    return _Modules(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a cluster goes first, and the sweep last, whose tests fill what time is left.

    Within each of these the order is random, or whatever it was.
    """
    items.sort(key=lambda item: ("/test_ray_" not in item.nodeid) + ("/sweep/" in item.nodeid))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much the sweep has swept, which is told by properties of its tests."""
    passed = terminalreporter.getreports("passed")
    if runs := sum(dict(report.user_properties).get("interleavings", 0) for report in passed):
        terminalreporter.write_line(f"cancellation sweep: {runs} interleavings")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The library is asyncio only."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with a chat template."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), "0")


def make_tiny(folder: Path, *options: str) -> Path:
    """Write a tiny model, on the MLX thread: what ``python -m tests.tiny`` does."""
    over = threading.Event()
    turn = ThreadJob[None](
        lambda: main([str(folder), *options]), None, lambda _: over.set(), attended=False
    )
    mlx_thread.submit(turn)
    assert over.wait(PATIENCE)
    if turn.error is not None:
        raise turn.error
    return folder


@pytest.fixture(params=[SimpleEngine, BatchedEngine], ids=["simple", "batched"])
def engine_type(request: pytest.FixtureRequest) -> type[SimpleEngine] | type[BatchedEngine]:
    """Every kind of engine: what is asked for here holds for all of them."""
    kind: type[SimpleEngine] | type[BatchedEngine] = request.param
    return kind


@pytest.fixture
def simple_type() -> type[BaseEngine]:
    """An engine that serves one request at a time."""
    return SimpleEngine


@pytest.fixture
def batched_type() -> type[BaseEngine]:
    """An engine that serves many at once."""
    return BatchedEngine


@pytest.fixture
def tiny_engine(tiny_path: Path, engine_type: type[SimpleEngine]) -> BaseEngine:
    """An engine on the tiny model that has not been started."""
    return engine_type(tiny_path)


@pytest.fixture
async def engine(tiny_engine: BaseEngine) -> AsyncIterator[BaseEngine]:
    """A running engine on the tiny model."""
    async with tiny_engine:
        yield tiny_engine


def on_mlx_thread(test: Callable[..., None]) -> Any:
    """MLX belongs to one thread, in tests too."""

    @functools.wraps(test)
    async def run(**fixtures: Any) -> None:
        await mlx_thread.run(ThreadJob(functools.partial(test, **fixtures)))

    return run


@pytest.fixture
def gate() -> Iterator[Callable[[str, int], Gate]]:
    """Makes gates: ``gate("model", 3)`` stops the MLX thread inside its third model call."""
    gates: list[Gate] = []

    def make(name: str, at: int) -> Gate:
        gates.append(Gate(name, at))
        GUARD.hook = gates[-1]
        return gates[-1]

    yield make
    GUARD.hook = None
    for each in gates:
        each.go()


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """As it is by the children of a shell that runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


_modules = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def old_garbage() -> None:
    """What nobody collects while tests run, since it is older than they.

    Not before each module: all that was ever imported is looked at, a third of a second at last.
    """
    if next(_modules) % 8 == 0:
        gc.unfreeze()
        gc.collect()


@pytest.fixture(autouse=True, scope="session")
def the_machine_has_memory() -> None:
    """Or stored prompts would give way when other programs are short of it."""

    class Calm:
        def level(self) -> Level:
            return "normal"

    pressure.WATCH.source = Calm()


@pytest.fixture(autouse=True, scope="session")
def no_thread_lingers() -> None:
    """Or each test would wait for those that wait for more prompts."""
    preparer._LINGER = 0.0


@pytest.fixture(autouse=True)
def nothing_is_left_behind(old_garbage: None) -> Iterator[None]:
    """I1 and I6: after every test MLX is free, and no thread or turn has been left."""
    gc.freeze()  # else to collect what a test leaves takes ever longer, a third of a second at last
    GUARD.violations.clear()
    before = set(threading.enumerate())
    yield
    until_now(lambda: not _threads_since(before), "threads are left behind")
    # The turn of a batch ends a moment after its last request is over.
    until_now(lambda: not mlx_thread.busy, "the MLX thread is still at work")
    gc.collect()
    assert not GUARD.violations
    assert not mlx_thread.locked
    assert mlx_thread.waiting == 0


def _threads_since(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.name.startswith(("mlx", "asyncio_"))
    ]


@pytest.fixture
def told_to_stop(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once any work has been told to stop, or was withdrawn from a queue."""
    told = threading.Event()
    cancel = WorkQueue._cancel

    def noted(line: WorkQueue[Any], one: PendingWork[Any]) -> None:
        cancel(line, one)
        told.set()

    monkeypatch.setattr(WorkQueue, "_cancel", noted)
    return told


def other_tasks() -> set[asyncio.Task[object]]:
    """Every task of the running loop but the caller's and the test runner's."""
    return {
        task
        for task in asyncio.all_tasks()
        if task is not asyncio.current_task() and "TestRunner" not in repr(task.get_coro())
    }


async def cancel_inside(gate: Gate, work: Awaitable[object], times: int = 3) -> None:
    """Cancel ``work`` while the MLX thread stands at the gate, then let it go."""
    task = asyncio.ensure_future(work)
    await gate.reached()
    for _ in range(times):
        task.cancel()
        await turns()
        assert mlx_thread.locked, "the lock is free while the worker is inside"
        assert not task.done()
    gate.go()
    with pytest.raises(asyncio.CancelledError):
        await task


def all_ready(engine: BatchedEngine, count: int) -> bool:
    """Whether so many requests wait for a place in the batch, their prompts prepared."""
    seats = list(engine._scheduler.queue._queue)
    return len(seats) == count and all(seat.ready for seat in seats)


async def settled() -> None:
    """MLX is free. The turn of a batch ends a moment after its last request is over."""
    await until(lambda: not mlx_thread.busy, "the MLX thread is still at work")
