"""Engines for which there is no thread, no file or no memory: one error, and others go on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_engine import EngineDead, EngineManager, EngineState, ProcessEngine, SimpleEngine
from mlx_engine.core import threads
from mlx_engine.remote.io_thread import IOThread
from tests.conftest import ROOT
from tests.processes import children
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio

# Every program here has an engine, ``short``, a shortage and what ends it.
PROGRAM = """
import asyncio, resource, threading
from pathlib import Path
from mlx_engine import *

def limit(kind, value):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    return lambda: resource.setrlimit(kind, before)

def no_memory():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limit(resource.RLIMIT_AS, pages * resource.getpagesize() + 4 * 2**20)

def no_files():
    return limit(resource.RLIMIT_NOFILE, 3)

def no_threads():
    start = threading.Thread.start
    def cannot(thread):
        raise RuntimeError("can't start new thread")
    threading.Thread.start = cannot
    def undo():
        threading.Thread.start = start
    return undo

async def main():
    loop = asyncio.get_running_loop()
    for engine in {engines}:
        ended = {shortage}()
        for _ in range(2):
            try:
                async with asyncio.timeout(60):
                    await engine.start()
            except EngineDead as error:
                print(engine.state.value, type(error).__name__, str(error), flush=True)
        ended()
        async with asyncio.timeout(60), engine:
            print(len((await engine.generate("a", max_tokens=3)).tokens), flush=True)

asyncio.run(main())
"""


def run(shortage: str, engines: str) -> list[str]:
    program = PROGRAM.replace("{engines}", engines).replace("{shortage}", shortage)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("shortage", "said", "advice"),
    [
        ("no_threads", "can't start new thread", "limit of memory, threads or processes"),
        ("no_files", "Too many open files", "ulimit -n"),
        pytest.param(
            *("no_memory", "can't start new thread", "limit of memory, threads or processes"),
            marks=pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc for its size"),
        ),
    ],
)
def test_the_first_engine_says_what_is_missing_and_starts_when_it_is_there(
    tiny_path: Path, shortage: str, said: str, advice: str
) -> None:
    *errors, tokens = run(shortage, f"[ProcessEngine({str(tiny_path)!r})]")
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("created EngineDead ")
        assert said in error
        assert advice in error
    assert tokens == "3"


def test_a_manager_says_what_is_missing_and_starts_when_it_is_there(tiny_path: Path) -> None:
    *errors, tokens = run("no_threads", f"[EngineManager({str(tiny_path)!r}, replicas=2)]")
    assert [error.partition(" a thread cannot be started: can't start")[0] for error in errors] == [
        "created EngineDead",
        "created EngineDead",
    ]
    assert tokens == "3"


@pytest.mark.parametrize("kind", ["SimpleEngine", "BatchedEngine"])
def test_an_engine_in_this_process_says_what_is_missing(tiny_path: Path, kind: str) -> None:
    *errors, tokens = run("no_threads", f"[{kind}({str(tiny_path)!r})]")
    assert [error.partition(" a thread cannot be started: can't start")[0] for error in errors] == [
        "created EngineDead",
        "created EngineDead",
    ]
    assert tokens == "3"


@pytest.fixture
def silent_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Threads that are made and never come to say that they run, as when memory is short."""
    over = threading.Event()

    def start(thread: threading.Thread) -> None:
        over.wait()

    with monkeypatch.context() as patch:
        patch.setattr(threads, "START_LIMIT", 0.2)
        patch.setattr(threading.Thread, "start", start)
        yield patch
    over.set()


async def test_a_thread_that_never_runs_stops_no_other_engine(
    tiny_path: Path, request: pytest.FixtureRequest
) -> None:
    async with (
        ProcessEngine(tiny_path) as one,
        asyncio.timeout(60),
        one.stream_generate("a", max_tokens=15000, ignore_eos=True) as stream,
    ):
        await anext(stream)
        patch = request.getfixturevalue("silent_threads")
        other = ProcessEngine(tiny_path)
        start = asyncio.create_task(other.start())
        while not start.done():
            await anext(stream)
        with pytest.raises(EngineDead, match="it did not come to run"):
            await start
        assert other.state is EngineState.CREATED
        assert len(children()) == 1
        patch.undo()
        async with other:
            await anext(stream)


@pytest.mark.parametrize("kind", [ProcessEngine, SimpleEngine, EngineManager])
async def test_a_start_that_waits_for_a_thread_can_be_cancelled(
    tiny_path: Path,
    kind: type[ProcessEngine],
    silent_threads: pytest.MonkeyPatch,
) -> None:
    # By the same object: or the limit of before would come back when the other one goes.
    silent_threads.setattr(threads, "START_LIMIT", 1000.0)
    engine = kind(tiny_path)
    async with asyncio.timeout(PATIENCE):
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0.05)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    assert engine.state is EngineState.CREATED
    silent_threads.undo()
    async with asyncio.timeout(60), engine:
        assert len((await engine.generate("a", max_tokens=3, ignore_eos=True)).tokens) == 3


async def test_the_io_thread_that_never_runs_is_given_up_for_all_and_tried_again(
    silent_threads: pytest.MonkeyPatch,
) -> None:
    async def work() -> str:
        return threading.current_thread().name

    thread = IOThread()
    ends = await asyncio.gather(*(thread.run(work) for _ in range(3)), return_exceptions=True)
    assert [type(end) for end in ends] == [EngineDead] * 3
    assert len({id(end) for end in ends}) == 3
    silent_threads.undo()
    assert await thread.run(work) == "mlx-engine io"
