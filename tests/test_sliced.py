"""Work in slices: whose turn is when, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from mlx_engine import EngineStopped
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.sliced_job import Rest, SlicedJob
from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.core.turns import Turns
from mlx_engine.core.work import Stage, ThreadJob
from tests.waiting import PATIENCE, until, until_now

pytestmark = pytest.mark.anyio


async def run(job: SlicedJob[object]) -> object:
    with job.on_thread("slices"):
        return await mlx_thread.run(job)


def doing(rest: Callable[[Turns], object]) -> SlicedJob[object]:
    def begin() -> Rest[object]:
        assert mlx_thread.is_current()
        return rest

    return SlicedJob(begin)


async def test_turns_are_on_the_mlx_thread_and_the_rest_is_not() -> None:
    def rest(turns: Turns) -> object:
        assert not mlx_thread.is_current()
        return [turns.take(mlx_thread.is_current), turns.take(divmod, 7, 3)]

    assert await run(doing(rest)) == [True, (2, 1)]


async def test_whoever_waits_has_a_turn_between_two_slices() -> None:
    order: list[str] = []
    go = threading.Event()

    def rest(turns: Turns) -> object:
        turns.take(lambda: go.wait(PATIENCE) and order.append("slice"))
        for _ in range(2):
            turns.take(order.append, "slice")
        return "done"

    def other(name: str) -> None:
        # The next slice is there, and has been queued for longer, as a whole.
        until_now(lambda: any(job.is_slice for job in list(mlx_thread._queue)))
        order.append(name)

    slices = asyncio.create_task(run(doing(rest)))
    await until(lambda: mlx_thread._running is not None and mlx_thread._running.is_slice)
    others = [asyncio.create_task(mlx_thread.run(ThreadJob(lambda n=n: other(n)))) for n in "ab"]  # type: ignore[misc]
    await until(lambda: mlx_thread.waiting == 2)
    go.set()
    assert await slices == "done"
    await asyncio.gather(*others)
    assert order == ["slice", "a", "slice", "b", "slice"]


async def test_what_a_slice_or_the_rest_raises_is_told_without_the_slices_frames() -> None:
    def broken() -> None:
        raise ZeroDivisionError("in a slice")

    def rest(turns: Turns) -> object:
        try:
            turns.take(broken)
        except ZeroDivisionError as error:
            trace = error.__traceback__
            while trace is not None:
                assert trace.tb_frame.f_code is not broken.__code__
                trace = trace.tb_next
            raise LookupError("beside") from error
        return None

    with pytest.raises(LookupError, match="beside"):
        await run(doing(rest))


async def test_what_fails_at_its_beginning_never_goes_on() -> None:
    def begin() -> Rest[object]:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        await run(SlicedJob(begin))


async def test_the_rest_is_told_to_stop_at_its_next_checkpoint() -> None:
    ended: list[type[BaseException]] = []
    begun = threading.Event()

    def rest(turns: Turns) -> object:
        begun.set()
        try:
            until_now(lambda: turns.stopped)
            checkpoint()
        except Interrupted as error:
            ended.append(type(error))
            with pytest.raises(Interrupted):
                turns.take(lambda: None)
            raise
        return None

    job = doing(rest)
    task = asyncio.create_task(run(job))
    await until(begun.is_set)
    assert job.stage is Stage.RUNNING
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [Interrupted]
    assert job.stage is Stage.DONE


async def test_aborted_between_two_slices_it_gets_that_error() -> None:
    begun = threading.Event()

    def rest(turns: Turns) -> object:
        begun.set()
        until_now(lambda: turns.stopped)
        return turns.take(lambda: 7)

    job = doing(rest)
    task = asyncio.create_task(run(job))
    await until(begun.is_set)
    assert mlx_thread.abort(job, EngineStopped("over"))
    with pytest.raises(EngineStopped, match="over"):
        await task
    assert not mlx_thread.abort(job, EngineStopped("again"))
