"""The moments in which an engine's process is being made: nobody else waits for it."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import EngineDead, EngineState, EngineStopped, ProcessEngine
from tests.processes import children
from tests.waiting import PATIENCE, PROMPTLY, until

pytestmark = pytest.mark.anyio


class SlowSpawn:
    """Has processes made slowly, as by a program with much memory on a busy machine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.over = threading.Event()
        make = subprocess.Popen

        def popen(*args: Any, **options: Any) -> Any:
            self.begun.set()
            self.go.wait()
            try:
                return make(*args, **options)
            finally:
                self.over.set()

        patch.setattr(subprocess, "Popen", popen)
        self.undo = patch.undo

    async def reached(self) -> None:
        await until(self.begun.is_set)

    async def finish(self) -> None:
        self.go.set()
        await until(self.over.is_set)
        self.undo()


@pytest.fixture
def slow() -> Iterator[SlowSpawn]:
    with pytest.MonkeyPatch.context() as patch:
        spawn = SlowSpawn(patch)
        yield spawn
        spawn.go.set()


async def test_streams_go_on_while_a_process_is_being_made(
    tiny_path: Path, request: pytest.FixtureRequest
) -> None:
    async with (
        ProcessEngine(tiny_path) as one,
        asyncio.timeout(60),
        one.stream_generate("a", max_tokens=15000, ignore_eos=True) as stream,
    ):
        slow = request.getfixturevalue("slow")
        other = ProcessEngine(tiny_path)
        start = asyncio.create_task(other.start())
        await slow.reached()
        for _ in range(50):
            await anext(stream)
        assert not start.done()
        await slow.finish()
        await start
        await other.stop()


@pytest.mark.parametrize("way", ["cancel", "stop", "kill", "drop the loop"])
async def test_nothing_is_left_of_a_process_that_nobody_wants_when_it_is_there(
    tiny_path: Path, slow: SlowSpawn, way: str
) -> None:
    engine = ProcessEngine(tiny_path)
    async with asyncio.timeout(PATIENCE):
        if way == "drop the loop":
            await asyncio.to_thread(_start_and_close, engine, slow.begun)
        else:
            start = asyncio.create_task(engine.start())
            await slow.reached()
            began = time.monotonic()
            if way == "cancel":
                start.cancel()
                start.cancel()
            elif way == "stop":
                await engine.stop()
            else:
                engine.kill()
            with pytest.raises((asyncio.CancelledError, EngineStopped, EngineDead)):
                await start
            assert time.monotonic() - began < PROMPTLY, "it has waited for the process"
        await slow.finish()
        await until(lambda: not children())
        async with engine:
            assert engine.state is EngineState.RUNNING
            assert len(children()) == 1


def _start_and_close(engine: ProcessEngine, begun: threading.Event) -> None:
    """Close an event loop in which an engine starts."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.start())
    while not begun.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    del task
    loop.close()


async def test_a_process_that_comes_just_after_it_was_cancelled_is_ended_first(
    tiny_path: Path, slow: SlowSpawn
) -> None:
    engine = ProcessEngine(tiny_path)
    start = asyncio.create_task(engine.start())
    await slow.reached()
    start.cancel()
    await asyncio.sleep(0)
    slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not children()


async def test_a_process_that_cannot_be_made_is_told_without_one(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*args: Any, **options: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    engine = ProcessEngine(tiny_path)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        with pytest.raises(EngineDead, match="temporarily unavailable: the limit of memory"):
            await engine.start()
    assert engine.state is EngineState.CREATED
    async with engine:
        pass
