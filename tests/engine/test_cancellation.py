"""Cancelling real requests in every phase, in every way (I1 to I4, I6)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from mlx_lm.models import mimo

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    EngineState,
    GenerationResult,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.core.mlx_thread import mlx_thread
from tests.conftest import cancel_inside, other_tasks, settled
from tests.generation.rigged import made
from tests.guard import GUARD, Gate
from tests.models.mtp_checkpoints import MIMO
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio

STEP = 16
CHUNKS = 5
PROMPT = list(range(1, 1 + STEP * CHUNKS + 1))  # five chunks of prefill, one token to decode
MAX_TOKENS = 12

Operation = Callable[[], Awaitable[object]]
MakeGate = Callable[[str, int], Gate]


async def plain(engine: BaseEngine) -> GenerationResult:
    return await engine.generate(PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True)


async def streamed(engine: BaseEngine) -> GenerationResult:
    async with engine.stream_generate(PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True) as stream:
        async for _ in stream:
            pass
    return stream.result


async def bare_iteration(engine: BaseEngine) -> GenerationResult:
    stream = engine.stream_generate(PROMPT, max_tokens=MAX_TOKENS, ignore_eos=True)
    async for _ in stream:
        pass
    return stream.result


async def in_a_chat(engine: BaseEngine) -> GenerationResult:
    messages = [{"role": "user", "content": "x" * STEP * CHUNKS}]
    return await engine.chat(messages, max_tokens=MAX_TOKENS, ignore_eos=True)


TRIALS: dict[str, Callable[[Path], BaseEngine]] = {
    "batch": BatchedEngine,
    "draft": lambda model: SimpleEngine(model, decode=DraftModel(model)),
    "mtp": lambda model: SimpleEngine(model, decode=MTP()),
    "specprefill": lambda model: SimpleEngine(model, prefill=SpecPrefill(model)),
}
OPERATIONS = {f.__name__: f for f in (plain, streamed, bare_iteration, in_a_chat)}
PHASES = {
    "first chunk": ("model", 1),
    "prefill": ("model", 3),
    "first token": ("model", CHUNKS + 1),
    "decode": ("model", CHUNKS + 6),
    "last step": ("model", CHUNKS + MAX_TOKENS),
}


async def once(operation: Operation, gate: Gate) -> None:
    await cancel_inside(gate, operation(), 1)


async def twice(operation: Operation, gate: Gate) -> None:
    await cancel_inside(gate, operation(), 2)


async def five_times(operation: Operation, gate: Gate) -> None:
    await cancel_inside(gate, operation(), 5)


async def let_go_later(gate: Gate) -> None:
    for _ in range(5):
        await turns()
        assert mlx_thread.locked, "the lock is free while the worker is inside"
    gate.go()


async def by_timeout(operation: Operation, gate: Gate) -> None:
    async def expire(timeout: asyncio.Timeout) -> None:
        await gate.reached()
        timeout.reschedule(asyncio.get_running_loop().time())
        await let_go_later(gate)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            helper = asyncio.create_task(expire(timeout))
            await operation()
    await helper


async def by_task_group(operation: Operation, gate: Gate) -> None:
    async def fail() -> None:
        await gate.reached()
        helpers.append(asyncio.create_task(let_go_later(gate)))
        raise LookupError("sibling")

    helpers: list[asyncio.Task[None]] = []
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await operation()
    assert caught.group_contains(LookupError)
    await helpers[0]


async def by_anyio_scope(operation: Operation, gate: Gate) -> None:
    async def expire(scope: anyio.CancelScope) -> None:
        await gate.reached()
        scope.cancel()
        await let_go_later(gate)

    with anyio.move_on_after(None) as scope:
        helper = asyncio.create_task(expire(scope))
        await operation()
    assert scope.cancelled_caught
    await helper


async def by_anyio_task_group(operation: Operation, gate: Gate) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(operation)
        await gate.reached()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await let_go_later(gate)


WAYS = {
    f.__name__: f
    for f in (
        once,
        twice,
        five_times,
        by_timeout,
        by_task_group,
        by_anyio_scope,
        by_anyio_task_group,
    )
}


@pytest.fixture
async def engine(tiny_path: Path, engine_type: type[SimpleEngine]) -> AsyncIterator[BaseEngine]:
    # No prompt cache: every prefill is to have all of its chunks.
    async with engine_type(tiny_path, prefill_step_size=STEP, prompt_cache_bytes=0) as engine:
        yield engine
        await settled()
        assert not other_tasks(), "a task was left behind"


@pytest.fixture
async def narrow(tiny_path: Path, engine_type: type[SimpleEngine]) -> AsyncIterator[BaseEngine]:
    """An engine in which a second request has to wait."""
    if engine_type is SimpleEngine:
        engine: BaseEngine = SimpleEngine(tiny_path, prefill_step_size=STEP)
    else:
        engine = BatchedEngine(tiny_path, prefill_step_size=STEP, max_batch_size=1)
    async with engine:
        yield engine


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_cancelled_request_leaves_mlx_and_the_next_one_is_served(
    engine: BaseEngine, gate: MakeGate, operation: str, way: str, phase: str
) -> None:
    name, at = PHASES[phase]
    stop = gate(name, at)
    expected = engine.stats()
    await WAYS[way](lambda: OPERATIONS[operation](engine), stop)
    assert stop.calls == at, "it went on after the step or chunk that it was in"
    await settled()
    assert engine.stats().cancelled == expected.cancelled + 1
    result = await plain(engine)
    assert len(result.tokens) == MAX_TOKENS
    assert result.finish_reason == "length"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_cancelled_while_queued_it_never_enters(
    narrow: BaseEngine, gate: MakeGate, operation: str, way: str
) -> None:
    engine = narrow
    stop = gate("model", CHUNKS + 2)
    holder = asyncio.create_task(plain(engine))
    await stop.reached()
    queued = asyncio.Event()

    class Queued(Gate):
        """Reached when the operation is in the queue; there is no worker to let go."""

        async def reached(self) -> None:
            await until(lambda: engine.stats().waiting)
            queued.set()

        def go(self) -> None:
            pass

    if way in ("once", "twice", "five_times"):
        # The cancelled caller is free at once, so that there is nobody to cancel again.
        task = asyncio.ensure_future(OPERATIONS[operation](engine))
        await Queued("", 0).reached()
        for _ in range(("once", "twice").index(way) + 1 if way != "five_times" else 5):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await WAYS[way](lambda: OPERATIONS[operation](engine), Queued("", 0))
    assert mlx_thread.locked
    assert engine.stats().waiting == 0
    stop.go()
    assert len((await holder).tokens) == MAX_TOKENS
    assert engine.stats().finished == 1
    assert engine.stats().cancelled == 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_loop_shutdown_waits_for_the_worker(
    tiny_path: Path,
    engine_type: type[SimpleEngine],
    gate: MakeGate,
    told_to_stop: threading.Event,
    operation: str,
    phase: str,
) -> None:
    engine = engine_type(tiny_path, prefill_step_size=STEP, prompt_cache_bytes=0)
    asyncio.run(engine.start())
    stop = gate(*PHASES[phase])

    async def main() -> None:
        asyncio.create_task(OPERATIONS[operation](engine))  # type: ignore[arg-type]  # noqa: RUF006
        await stop.reached()

    stop.go_after(told_to_stop.is_set)
    asyncio.run(main())
    asyncio.run(settled())
    assert stop.calls == PHASES[phase][1]

    async def again() -> None:
        assert engine.state is EngineState.RUNNING
        assert len((await plain(engine)).tokens) == MAX_TOKENS
        await engine.stop()

    asyncio.run(again())


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_start_leaves_nothing_and_can_be_tried_again(
    tiny_path: Path, gate: MakeGate, way: str
) -> None:
    stop = gate("eval", 1)
    engine = SimpleEngine(tiny_path)
    await WAYS[way](engine.start, stop)
    assert engine.state is EngineState.CREATED
    assert not engine._holder.loaded
    assert not other_tasks()
    await engine.start()
    assert engine.state is EngineState.RUNNING
    await engine.stop()


@pytest.mark.parametrize("trial", TRIALS)
async def test_a_cancelled_start_makes_no_more_trials_of_the_model(
    trial: str,
    tiny_path: Path,
    tmp_path: Path,
    gate: MakeGate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = GUARD._guarded("model", mimo.Model.__call__)
    monkeypatch.setattr(mimo.Model, "__call__", whole)
    model = await made(MIMO, tmp_path) if trial == "mtp" else tiny_path
    engine = TRIALS[trial](model)
    stop = gate("model", 2)
    await cancel_inside(stop, engine.start())
    assert stop.calls == 2
    assert engine.state is EngineState.CREATED
    await engine.start()
    assert stop.calls >= 2 + 4, "there would have been more"
    await engine.stop()


@pytest.mark.parametrize("way", WAYS)
async def test_run_blocking_is_held_until_the_function_returns(
    engine: BaseEngine, way: str
) -> None:
    stop = Gate("call", 1)
    asked = threading.Event()
    returned = threading.Event()

    def function() -> int:
        stop("call")
        returned.set()
        return 1

    await WAYS[way](lambda: engine.run_blocking(function, on_cancel=asked.set), stop)
    assert asked.is_set()
    assert returned.is_set()
    assert await engine.run_blocking(lambda: 2) == 2


async def test_a_cancelled_stop_still_stops(engine: BaseEngine, gate: MakeGate) -> None:
    stop = gate("model", CHUNKS + 3)
    request = asyncio.create_task(plain(engine))
    await stop.reached()
    task = asyncio.create_task(engine.stop())
    await turns()
    task.cancel()
    await turns()
    task.cancel()
    await turns()
    assert not task.done()
    stop.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(Exception, match="stopped while this was in flight"):
        await request
    assert engine.state is EngineState.STOPPED
    assert not engine._holder.loaded
