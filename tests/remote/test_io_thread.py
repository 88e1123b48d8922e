"""The I/O thread's beginning and end: whoever waits for something in it is told."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mlx_engine import EngineDead
from mlx_engine.remote.io_thread import IOThread
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio


async def work() -> threading.Thread:
    return threading.current_thread()


async def for_ever() -> None:
    await asyncio.Event().wait()


async def stopped() -> tuple[IOThread, threading.Thread]:
    """One whose loop has stopped and is not closed yet, as for a moment at exit."""
    thread = IOThread()
    runner = await thread.run(work)
    loop = thread._loop
    assert loop is not None
    thread.call(loop.stop)
    await asyncio.to_thread(runner.join)
    return thread, runner


async def close(thread: IOThread, runner: threading.Thread) -> None:
    assert thread._loop is not None
    await asyncio.to_thread(thread._close, thread._loop, runner)


async def test_what_comes_when_the_loop_has_just_stopped_is_told_so() -> None:
    thread, runner = await stopped()
    late = asyncio.create_task(thread.run(work))
    await asyncio.sleep(0)
    await close(thread, runner)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(EngineDead, match="shutting down"):
            await late
        with pytest.raises(EngineDead, match="shutting down"):
            await thread.run(work)


async def test_what_never_began_can_be_cancelled_when_the_loop_has_stopped() -> None:
    thread, runner = await stopped()
    late = asyncio.create_task(thread.run(work))
    await asyncio.sleep(0)
    late.cancel()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await late
    await close(thread, runner)


async def test_the_end_of_the_loop_tells_those_who_wait_for_what_goes_on() -> None:
    thread = IOThread()
    runner = await thread.run(work)
    waiting = [asyncio.create_task(thread.run(for_ever)) for _ in range(3)]
    await thread.run(work)
    await close(thread, runner)
    async with asyncio.timeout(PATIENCE):
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [EngineDead] * 3
    assert not runner.is_alive()


async def test_short_memory_in_a_turn_of_the_loop_ends_nothing() -> None:
    thread = IOThread()
    runner = await thread.run(work)
    loop, once = thread._loop, threading.Event()
    assert loop is not None
    step = loop._run_once  # type: ignore[attr-defined]

    def short() -> None:
        if not once.is_set():
            once.set()
            raise MemoryError
        step()

    waiting = asyncio.create_task(thread.run(for_ever))
    loop._run_once = short  # type: ignore[attr-defined]
    async with asyncio.timeout(PATIENCE):
        assert await thread.run(work) is runner
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert once.is_set()
    await close(thread, runner)
