"""Coroutines whose event loop is gone, and which are collected within another one."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BaseEngine, EngineState, GenerationChunk, GenerationResult
from mlx_engine.core.drain import wait_shielded
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.remote.serving.host import EngineHost
from tests.conftest import other_tasks, settled
from tests.guard import Gate
from tests.remote.hosting import short_folder
from tests.waiting import turns, until

MakeGate = Callable[[str, int], Gate]
LONG: dict[str, Any] = {"max_tokens": 5000, "ignore_eos": True}


class Left:
    """An event loop that is closed while a coroutine waits for something in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def begin(self, work: Coroutine[Any, Any, Any], reached: Callable[[], object]) -> None:
        """Go on until it has come there, and close the loop."""
        task = self.loop.create_task(work)
        self.loop.run_until_complete(until(reached))
        for each in asyncio.all_tasks(self.loop):
            each._log_destroy_pending = False  # type: ignore[attr-defined]
        self.loop.close()
        coroutine = task.get_coro()
        assert coroutine is not None
        self.coroutine = coroutine

    def collect(self) -> None:
        """As the garbage collector does, within an event loop that has nothing to do with it."""

        async def elsewhere() -> None:
            self.coroutine.close()
            gc.collect()
            await turns()
            assert not other_tasks(), "it has begun something here"

        asyncio.run(elsewhere())


@pytest.fixture
def left() -> Left:
    return Left()


async def once(engine: BaseEngine) -> GenerationResult:
    result = await engine.generate([1, 2], max_tokens=2, ignore_eos=True)
    await engine.stop()
    return result


async def again(engine: BaseEngine) -> GenerationResult:
    await engine.start()
    return await once(engine)


def test_a_start(tiny_engine: BaseEngine, gate: MakeGate, left: Left) -> None:
    stop = gate("eval", 1)
    left.begin(tiny_engine.start(), lambda: stop.calls)
    stop.go()
    left.collect()
    assert tiny_engine.state is EngineState.CREATED
    assert asyncio.run(again(tiny_engine)).tokens


def test_a_stream_in_its_async_with(tiny_engine: BaseEngine, gate: MakeGate, left: Left) -> None:
    async def consume() -> None:
        await tiny_engine.start()
        async with tiny_engine.stream_generate([1], **LONG) as stream:
            async for _ in stream:
                pass

    stop = gate("model", 50)
    left.begin(consume(), lambda: stop.calls >= 50)
    stop.go()
    left.collect()
    asyncio.run(settled())
    assert asyncio.run(once(tiny_engine)).tokens


def test_an_engine_in_its_async_with(tiny_engine: BaseEngine, left: Left) -> None:
    async def live() -> None:
        async with tiny_engine:
            await asyncio.Event().wait()

    left.begin(live(), lambda: tiny_engine.state is EngineState.RUNNING)
    left.collect()
    assert tiny_engine.state is EngineState.RUNNING, "nobody could wait for its stop"
    assert asyncio.run(once(tiny_engine)).tokens


def test_a_shutdown(tiny_engine: BaseEngine, gate: MakeGate, left: Left) -> None:
    async def live() -> None:
        await tiny_engine.start()
        task = asyncio.create_task(tiny_engine.generate([1], **LONG))
        await until(lambda: stop.calls >= 50)
        await tiny_engine.shutdown(None)
        await task

    stop = gate("model", 50)
    left.begin(live(), lambda: tiny_engine.state is EngineState.DRAINING)
    stop.go()
    left.collect()
    asyncio.run(tiny_engine.stop())
    assert tiny_engine.state is EngineState.STOPPED
    assert asyncio.run(again(tiny_engine)).tokens


def test_a_host_in_its_async_with(tiny_engine: BaseEngine, left: Left) -> None:
    with short_folder() as folder:

        async def serve() -> None:
            await tiny_engine.start()
            async with EngineHost(tiny_engine, folder / "socket"):  # type: ignore[arg-type]
                await asyncio.Event().wait()

        with pytest.warns(ResourceWarning):  # for the sockets, whose loop was closed
            left.begin(serve(), (folder / "socket").exists)
            left.collect()
            left.__dict__.clear()
            gc.collect()
        assert asyncio.run(once(tiny_engine)).tokens


@pytest.mark.anyio
async def test_a_generator_that_is_closed_waits_until_its_request_is_out(
    engine: BaseEngine, gate: MakeGate, told_to_stop: Any
) -> None:
    async def chunks() -> AsyncIterator[GenerationChunk]:
        async with engine.stream_generate([1], **LONG) as stream:
            async for chunk in stream:
                yield chunk

    stop = gate("model", 5)
    answer = chunks()
    await anext(answer)
    await stop.reached()
    closing = asyncio.ensure_future(answer.aclose())  # type: ignore[attr-defined]
    await until(told_to_stop.is_set)
    await turns()
    assert not closing.done()
    assert mlx_thread.locked
    stop.go()
    await closing
    await settled()
    assert engine.stats().cancelled == 1


@pytest.mark.anyio
async def test_a_generator_that_is_closed_stops_its_engine(tiny_engine: BaseEngine) -> None:
    async def lives() -> AsyncIterator[Path]:
        async with tiny_engine:
            yield Path()

    life = lives()
    await anext(life)
    assert tiny_engine.state is EngineState.RUNNING
    await life.aclose()  # type: ignore[attr-defined]
    assert tiny_engine.state is EngineState.STOPPED


@pytest.mark.parametrize("cancels", [1, 2])
def test_whoever_waits_for_work_to_leave_is_let_go_with_its_loop(cancels: int) -> None:
    loop = asyncio.new_event_loop()

    async def wait() -> None:
        await wait_shielded(loop.create_future())

    async def give_up(task: asyncio.Task[None]) -> None:
        for _ in range(cancels):
            await turns()
            task.cancel()
        await turns()
        assert not task.done()

    task = loop.create_task(wait())
    loop.run_until_complete(give_up(task))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    kept = weakref.ref(task)
    del task
    gc.collect()
    assert kept() is None
