"""Engines in a fork of the process in which they were started: told so, once, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

START = """
import asyncio, gc, logging, os, sys, threading
from mlx_engine import *
logging.basicConfig(level=logging.WARNING)
engine = {kind}({path!r})
other = {kind}({path!r})
loop = asyncio.new_event_loop()

async def stream():
    async for _ in engine.stream_generate("a", max_tokens=2):
        pass

async def tell(name, work):
    try:
        async with asyncio.timeout(60):
            said = await work()
    except Exception as error:
        said = f"{{type(error).__name__}}: {{error}}"
    print(name, engine.state.value, said, flush=True)

async def used():
    for name in ("start", "generate", "stream", "chat", "batch"):
        await tell(name, {{
            "start": engine.start,
            "generate": lambda: engine.generate("a", max_tokens=2),
            "stream": stream,
            "chat": lambda: engine.chat([{{"role": "user", "content": "a"}}], max_tokens=2),
            "batch": lambda: engine.generate_batch(["a"], max_tokens=2),
        }}[name])
    print("stats", engine.stats().state, engine.stats().running, flush=True)
    for name in ("stop", "again"):
        await tell(name, engine.stop)
    await tell("new", other.start)
    print(other.state.value, flush=True)

def in_a_fork(work):
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""

USED = """
loop.run_until_complete(engine.start())
in_a_fork(lambda: asyncio.run(used()))
result = loop.run_until_complete(engine.generate("a", max_tokens=2, ignore_eos=True))
print("parent", engine.state.value, len(result.tokens))
loop.run_until_complete(engine.stop())
loop.close()
"""

KINDS = ["SimpleEngine", "BatchedEngine", "ProcessEngine", "EngineManager"]


def run(kind: str, path: Path, body: str) -> list[str]:
    program = START.format(kind=kind, path=str(path)) + body
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_ran_before_a_fork_says_so_there_and_runs_on_here(
    tiny_path: Path, kind: str
) -> None:
    *refused, stats, stop, again, new, state, parent = run(kind, tiny_path, USED)
    assert len(refused) == 5
    for line in [*refused, new]:
        assert "RuntimeError: " in line
        assert line.endswith(
            "before this process was forked, and does not survive a fork: start the process "
            "with the 'spawn' method instead"
        )
    assert [line.split()[1] for line in refused] == ["failed"] * 5
    assert stats == "stats failed 0"
    assert stop == "stop stopped ShutdownReport(finished=(), aborted=())"
    assert again == "again stopped ShutdownReport(finished=(), aborted=())"
    assert state == "created"
    assert parent == "parent running 2"


LOCKED = """
loop.run_until_complete(engine.start())
held = threading.Event()
go = threading.Event()
locks = [each._lock for each in (engine._lifecycle, {more})]

def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    go.wait()
    for lock in locks:
        lock.release()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
in_a_fork(lambda: asyncio.run(used()))
go.set()
holder.join()
loop.run_until_complete(engine.stop())
loop.close()
"""


@pytest.mark.parametrize(
    ("kind", "more"),
    [("SimpleEngine", "engine._lifecycle"), ("EngineManager", "engine._replicas")],
)
def test_a_lock_that_somebody_held_when_the_process_was_forked_holds_up_nobody(
    tiny_path: Path, kind: str, more: str
) -> None:
    lines = run(kind, tiny_path, LOCKED.replace("{more}", more))
    assert "stats failed 0" in lines
    assert lines[-1] == "created"


UNUSED = """
def serve():
    async def use():
        async with engine:
            print(len((await engine.generate("a", max_tokens=2, ignore_eos=True)).tokens))
    asyncio.run(use())
in_a_fork(serve)
loop.run_until_complete(engine.start())
loop.run_until_complete(engine.stop())
loop.close()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_was_only_made_before_a_fork_can_be_used_in_it(
    tiny_path: Path, kind: str
) -> None:
    assert run(kind, tiny_path, UNUSED) == ["2"]
