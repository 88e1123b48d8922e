"""States, shutdown and the queue: every waiter is completed, always."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    EngineBusy,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationResult,
    InvalidRequest,
    ModelLoadError,
    Progress,
    ShutdownReport,
    SimpleEngine,
)
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.stop import Interrupted
from tests.conftest import other_tasks
from tests.guard import Gate
from tests.waiting import PATIENCE, turns, until, until_now

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
PROMPT = [1, 2, 3]
MAX_WAIT = 1000.0  # seconds; tests that need it to pass say when


def request(engine: BaseEngine, max_tokens: int = 10) -> asyncio.Task[GenerationResult]:
    return asyncio.create_task(engine.generate(PROMPT, max_tokens=max_tokens, ignore_eos=True))


async def queued(engine: BaseEngine, count: int) -> None:
    """Wait until one request is in work and ``count`` others are in the engine as well."""
    await until(lambda: (stats := engine.stats()).waiting + stats.running > count)


def aborted(engine: BaseEngine) -> bool:
    """Whether a shutdown has told all that was in flight to end."""
    left = engine._lifecycle._draining  # type: ignore[attr-defined]
    return bool(left) and all(ticket.aborted for ticket in left)


async def test_the_life_of_an_engine(tiny_engine: BaseEngine) -> None:
    engine = tiny_engine
    assert engine.state is EngineState.CREATED
    with pytest.raises(EngineNotStarted, match="await start"):
        await engine.generate(PROMPT)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    assert engine.state is EngineState.STARTING
    with pytest.raises(EngineNotStarted, match="still loading"):
        await engine.run_blocking(lambda: None)
    await starting
    assert engine.state is EngineState.RUNNING
    await engine.start()
    assert await engine.stop() == ShutdownReport()
    assert engine.state is EngineState.STOPPED
    with pytest.raises(EngineStopped):
        await engine.generate(PROMPT)
    assert await engine.stop() == ShutdownReport()
    await engine.start()
    assert (await engine.generate(PROMPT, max_tokens=2, ignore_eos=True)).finish_reason == "length"
    await engine.stop()


async def test_two_tasks_may_start_it_at_once(tiny_engine: BaseEngine) -> None:
    await asyncio.gather(*(tiny_engine.start() for _ in range(3)))
    assert tiny_engine.state is EngineState.RUNNING
    await tiny_engine.stop()


async def test_a_start_that_waits_for_another_hears_of_its_failure(tmp_path: Path) -> None:
    engine = SimpleEngine(tmp_path)
    first, second = await asyncio.gather(engine.start(), engine.start(), return_exceptions=True)
    assert isinstance(first, ModelLoadError)
    assert isinstance(second, EngineNotStarted)
    assert engine.state is EngineState.CREATED


async def test_stop_before_start(tiny_engine: BaseEngine) -> None:
    assert await tiny_engine.stop() == ShutdownReport()
    assert tiny_engine.state is EngineState.STOPPED


async def test_stop_while_loading_ends_the_load_at_once(
    tiny_engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("eval", 1)
    starting = asyncio.create_task(tiny_engine.start())
    await stop.reached()
    stopping = asyncio.create_task(tiny_engine.shutdown(None))
    await turns()
    assert not stopping.done()
    stop.go()
    assert await stopping == ShutdownReport(), "a start is no request"
    with pytest.raises(EngineStopped):
        await starting
    assert tiny_engine.state is EngineState.STOPPED
    assert not tiny_engine._holder.loaded


async def test_loading_reports_progress_in_the_event_loop(tiny_path: Path) -> None:
    seen: list[tuple[Progress, bool]] = []
    main = threading.get_ident()
    engine = SimpleEngine(
        tiny_path, on_progress=lambda p: seen.append((p, threading.get_ident() == main))
    )
    async with engine:
        await asyncio.sleep(0)
        await engine.generate(
            [1] * 1200, max_tokens=2, on_progress=lambda p: seen.append((p, True))
        )
        await asyncio.sleep(0)
    loads = [p for p, _ in seen if p.phase == "load"]
    assert loads[-1].done == loads[-1].total
    assert loads[-1].done > 100_000
    prefill = [p for p, _ in seen if p.phase == "prefill"]
    assert [p.done for p in prefill] == [0, 512, 1024, 1199, 1200]
    assert {p.total for p in prefill} == {1200}
    assert all(on_loop for _, on_loop in seen)


async def test_stop_aborts_and_tells_everyone(engine: BaseEngine, gate: MakeGate) -> None:
    stop = gate("model", 5)
    tasks = [request(engine, 1000) for _ in range(4)]
    stream = engine.stream_generate(PROMPT, max_tokens=1000, ignore_eos=True)

    async def read() -> None:
        async for _ in stream:
            pass

    reader = asyncio.create_task(read())
    await stop.reached()
    await queued(engine, 4)
    stop.go_after(lambda: aborted(engine))
    report = await engine.stop()
    assert report.finished == ()
    assert sorted(report.aborted) == [f"req-{n}" for n in range(1, 6)]
    for task in [*tasks, reader]:
        with pytest.raises(EngineStopped):
            await task
    assert stop.calls <= 6
    assert not mlx_thread.busy
    assert engine.stats().cancelled == 5
    assert not other_tasks()


async def test_shutdown_with_time_lets_requests_finish(engine: BaseEngine, gate: MakeGate) -> None:
    stop = gate("model", 5)
    tasks = [request(engine) for _ in range(3)]
    await stop.reached()
    stopping = asyncio.create_task(engine.shutdown(10 * PATIENCE))
    await turns()
    assert engine.state is EngineState.DRAINING
    with pytest.raises(EngineStopped, match="draining"):
        await engine.generate(PROMPT)
    with pytest.raises(EngineStopped, match="draining"):
        async for _ in engine.stream_generate(PROMPT):
            pass
    stop.go()
    report = await stopping
    assert report == ShutdownReport(finished=("req-1", "req-2", "req-3"))
    assert all(len(task.result().tokens) == 10 for task in tasks)


async def test_shutdown_aborts_what_is_left_when_time_is_over(
    engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("model", 5)
    task = request(engine, 5000)
    await stop.reached()
    stop.go_after(lambda: aborted(engine))
    report = await engine.shutdown(0.02)
    assert report == ShutdownReport(aborted=("req-1",))
    with pytest.raises(EngineStopped):
        await task


async def test_two_shutdowns_at_once_the_earlier_deadline_counts(
    engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("model", 5)
    task = request(engine, 5000)
    await stop.reached()
    patient = asyncio.create_task(engine.shutdown(None))
    await turns()
    stop.go_after(lambda: aborted(engine))
    assert await engine.shutdown(0.01) == await patient == ShutdownReport(aborted=("req-1",))
    with pytest.raises(EngineStopped):
        await task


async def test_shutdown_from_another_loop_and_thread(engine: BaseEngine, gate: MakeGate) -> None:
    stop = gate("model", 5)
    task = request(engine, 5000)
    await stop.reached()
    stop.go_after(lambda: aborted(engine))
    report = await asyncio.to_thread(lambda: asyncio.run(engine.shutdown(0)))
    assert report.aborted == ("req-1",)
    with pytest.raises(EngineStopped):
        await task


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
async def test_a_bad_timeout_is_refused_and_nothing_stops(
    engine: BaseEngine, timeout: float
) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        await engine.shutdown(timeout)
    assert engine.state is EngineState.RUNNING


async def test_a_request_cancelled_by_its_own_caller_is_not_reported_as_aborted(
    engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("model", 5)
    task = request(engine, 5000)
    await stop.reached()
    stopping = asyncio.create_task(engine.shutdown(None))
    await turns()
    task.cancel()
    await turns()
    stop.go()
    assert await stopping == ShutdownReport(finished=("req-1",))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_is_no_request_is_drained_and_not_reported(
    engine: BaseEngine, tmp_path: Path
) -> None:
    go = threading.Event()
    function = asyncio.create_task(engine.run_blocking(go.wait, PATIENCE))
    saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
    task = request(engine, 3)
    await until(lambda: (stats := engine.stats()).waiting + stats.running == 3)
    stopping = asyncio.create_task(engine.shutdown(None))
    await turns()
    go.set()
    assert await stopping == ShutdownReport(finished=("req-1",))
    assert len((await task).tokens) == 3
    assert await function
    assert await saving <= 1  # the request may have been done between its slices


async def test_what_is_no_request_is_aborted_and_not_reported(
    engine: BaseEngine, tmp_path: Path
) -> None:
    go = threading.Event()
    function = asyncio.create_task(engine.run_blocking(go.wait, PATIENCE, on_cancel=go.set))
    loading = asyncio.create_task(engine.load_prompt_cache(tmp_path / "cache"))
    task = request(engine, 3)
    await until(lambda: (stats := engine.stats()).waiting + stats.running == 3)
    assert await engine.stop() == ShutdownReport(aborted=("req-1",))
    for each in (function, loading, task):
        with pytest.raises(EngineStopped):
            await each


async def test_queue_limit_refuses_and_says_when_to_come_back(
    tiny_path: Path, simple_type: Any, gate: MakeGate
) -> None:
    async with simple_type(tiny_path, queue_limit=2) as engine:
        stop = gate("model", 3)
        tasks = [request(engine)]
        await stop.reached()
        tasks += [request(engine), request(engine)]
        await queued(engine, 2)
        with pytest.raises(EngineBusy, match="queue_limit=2") as caught:
            await engine.generate(PROMPT)
        assert caught.value.retry_after > 0
        with pytest.raises(EngineBusy):
            await engine.run_blocking(lambda: None)
        with pytest.raises(EngineBusy):
            async for _ in engine.stream_generate(PROMPT):
                pass
        tasks[1].cancel()
        await asyncio.wait(tasks[1:2])
        tasks[1] = request(engine)
        await queued(engine, 2)
        assert engine.stats().waiting == 2
        assert engine.stats().running == 1
        stop.go()
        await asyncio.gather(*tasks)
        assert engine.stats().rejected == 3
        assert engine.stats().finished == 3


async def test_queue_limit_zero_serves_an_idle_engine(
    tiny_path: Path, simple_type: Any, gate: MakeGate
) -> None:
    async with simple_type(tiny_path, queue_limit=0) as engine:
        stop = gate("model", 3)
        task = request(engine)
        await stop.reached()
        with pytest.raises(EngineBusy):
            await engine.generate(PROMPT)
        stop.go()
        await task
        await engine.generate(PROMPT, max_tokens=1)


async def test_queue_limit_counts_those_who_wait_not_the_one_about_to_run(
    tiny_path: Path,
    simple_type: Any,
) -> None:
    async with simple_type(tiny_path, queue_limit=1) as engine:
        for _ in range(20):
            await asyncio.gather(request(engine, 1), request(engine, 1))


async def test_max_wait_ends_waiting_not_running(
    tiny_path: Path, simple_type: Any, gate: MakeGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_up: list[Callable[[], object]] = []

    def timer(delay: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        if delay == MAX_WAIT:
            times_up.append(functools.partial(callback, *args))
        return call_later(delay, callback, *args)

    loop = asyncio.get_running_loop()
    call_later = loop.call_later
    async with simple_type(tiny_path, max_wait=MAX_WAIT) as engine:
        monkeypatch.setattr(loop, "call_later", timer)
        stop = gate("model", 3)
        running = request(engine)
        await stop.reached()
        waiting = request(engine)
        await until(lambda: len(times_up) == 2)
        for time_is_up in times_up:
            time_is_up()
        with pytest.raises(EngineBusy, match="max_wait"):
            await waiting
        assert mlx_thread.waiting == 0
        stop.go()
        assert len((await running).tokens) == 10
        assert engine.stats().rejected == 1


async def test_max_wait_zero_means_now_or_never(
    tiny_path: Path, simple_type: Any, gate: MakeGate
) -> None:
    async with simple_type(tiny_path, max_wait=0) as engine:
        await engine.generate(PROMPT, max_tokens=1)
        stop = gate("model", 3)
        running = request(engine)
        await stop.reached()
        with pytest.raises(EngineBusy, match="max_wait=0"):
            await engine.generate(PROMPT)
        stop.go()
        await running


async def test_two_engines_share_the_thread_one_at_a_time(
    tiny_path: Path, simple_type: Any
) -> None:
    async with simple_type(tiny_path) as one, simple_type(tiny_path) as two:
        results = await asyncio.gather(*(request(e, 20) for e in (one, two) * 4))
        assert len({result.tokens for result in results}) == 1
        await one.stop()
        assert (await request(two)).finish_reason == "length"


async def test_the_model_is_dropped_by_stop_on_the_mlx_thread(tiny_engine: BaseEngine) -> None:
    dropped_on: list[bool] = []
    async with tiny_engine as engine:
        model = engine._holder.model().model
        weakref.finalize(model, lambda: dropped_on.append(mlx_thread.is_current()))
        await engine.generate(PROMPT, max_tokens=3)
        del model
    gc.collect()
    assert dropped_on == [True]


async def test_a_forgotten_engine_warns_and_drops_its_model_on_the_mlx_thread(
    tiny_path: Path,
) -> None:
    dropped_on: list[bool] = []
    engine = SimpleEngine(tiny_path)
    await engine.start()
    loaded = engine._holder.model()
    weakref.finalize(loaded.model, lambda: dropped_on.append(mlx_thread.is_current()))
    del loaded
    with pytest.warns(ResourceWarning, match="without being stopped"):
        del engine
        gc.collect()
    await until(lambda: dropped_on)
    assert dropped_on == [True]


@pytest.mark.parametrize("inside", [True, False])
def test_a_loop_that_ends_during_a_shutdown_leaves_no_model(
    tiny_path: Path, gate: MakeGate, told_to_stop: threading.Event, inside: bool
) -> None:
    engine = SimpleEngine(tiny_path)

    async def main() -> None:
        await engine.start()
        stop = gate("model", 3 if inside else 10_000)  # the start calls it, too
        if inside:
            asyncio.create_task(engine.generate(PROMPT))  # noqa: RUF006
            await stop.reached()
        asyncio.create_task(engine.shutdown(None))  # noqa: RUF006
        await asyncio.sleep(0)
        if inside:
            stop.go_after(told_to_stop.is_set)

    asyncio.run(main())
    assert asyncio.run(engine.stop()) is not None
    assert engine.state is EngineState.STOPPED
    until_now(lambda: not engine._holder.loaded)


@pytest.mark.parametrize("collected", ["at the end", "with no loop", "in another loop"])
def test_a_start_whose_loop_was_closed_does_not_block_the_next(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, collected: str
) -> None:
    from mlx_engine.engine import mlx_work

    begun, stopped = threading.Event(), threading.Event()
    original = mlx_work.find_model

    def slow(config: object, progress: object, should_stop: Callable[[], bool]) -> Path:
        begun.set()
        until_now(should_stop)
        stopped.set()
        raise Interrupted

    engine = SimpleEngine(tiny_path)
    monkeypatch.setattr(mlx_work, "find_model", slow)
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.start())
    loop.run_until_complete(until(begun.is_set))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert engine.state is EngineState.STARTING
    monkeypatch.setattr(mlx_work, "find_model", original)
    assert stopped.wait(PATIENCE)

    coroutine = task.get_coro()
    assert coroutine is not None

    async def again() -> None:
        if collected == "in another loop":
            coroutine.close()
        assert (await request(engine, 2)).finish_reason == "length"
        await engine.stop()

    asyncio.run(engine.start())
    if collected == "with no loop":
        coroutine.close()
    assert engine.state is EngineState.RUNNING
    asyncio.run(again())


async def test_stop_from_inside_a_turn_raises_instead_of_deadlocking(
    engine: BaseEngine,
) -> None:
    with pytest.raises(RuntimeError, match="from outside"):
        await engine.run_blocking(lambda: asyncio.run(engine.stop()))
    assert engine.state is EngineState.RUNNING


async def test_a_callback_may_begin_a_request(engine: BaseEngine) -> None:
    begun: list[asyncio.Task[GenerationResult]] = []
    await engine.generate(
        PROMPT, max_tokens=30, on_progress=lambda _: begun.append(request(engine))
    )
    assert begun
    for task in begun:
        assert (await task).finish_reason == "length"


async def test_stop_while_a_failed_start_cleans_up(tiny_path: Path, gate: MakeGate) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    stop = gate("model", 1)
    engine = SimpleEngine(tiny_path, kv_bits=4, kv_group_size=128)
    starting = asyncio.create_task(engine.start())
    await stop.reached()
    holder = asyncio.create_task(SimpleEngine(tiny_path).run_blocking(lambda: None))
    stopping = asyncio.create_task(engine.stop())
    stop.go()
    assert await stopping == ShutdownReport()
    outcomes = await asyncio.gather(starting, holder, return_exceptions=True)
    assert all(isinstance(error, Exception) for error in outcomes)
    assert engine.state is EngineState.STOPPED
    assert not engine._holder.loaded
    gc.collect()
    assert not complaints


async def test_a_stop_whose_helper_task_is_cancelled_still_stops(
    engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("model", 5)
    task = request(engine, 1000)
    await stop.reached()
    stopping = asyncio.create_task(engine.stop())
    await turns()
    for other in other_tasks() - {task, stopping}:
        other.cancel()
    await turns()
    stop.go()
    assert (await stopping).aborted == ("req-1",)
    assert engine.state is EngineState.STOPPED
    with pytest.raises(EngineStopped):
        await task


async def test_an_exception_in_the_body_still_stops_the_engine(tiny_engine: BaseEngine) -> None:
    with pytest.raises(LookupError):
        async with tiny_engine:
            raise LookupError
    assert tiny_engine.state is EngineState.STOPPED


async def test_run_blocking_passes_arguments_and_refuses_coroutines(engine: BaseEngine) -> None:
    def function(a: int, /, b: int, *, c: int) -> tuple[int, int, int]:
        assert mlx_thread.is_current()
        return a, b, c

    assert await engine.run_blocking(function, 1, 2, c=3) == (1, 2, 3)

    async def coroutine() -> None: ...

    for wrong in (coroutine, None, 5):
        with pytest.raises(InvalidRequest, match="func"):
            await engine.run_blocking(wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="wait for itself"):
        await engine.run_blocking(lambda: asyncio.run(engine.generate(PROMPT)))
    assert engine.stats().waiting == engine.stats().running == 0
    assert (await request(engine)).finish_reason == "length"
