"""Who gets a place in the batch, and when."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineBusy,
    EngineManager,
    GenerationResult,
    InvalidRequest,
    ProcessEngine,
    SimpleEngine,
    testing,
)
from mlx_engine.core.batch_queue import BatchQueue, QueuedRequest
from mlx_engine.core.work import PendingWork, Stage
from mlx_engine.testing import FakeEngine
from tests.conftest import make_tiny, settled
from tests.guard import Gate
from tests.waiting import until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
BYTES_A_TOKEN = 2 * 2 * 32 * 4  # keys and values of 2 layers with one head of 32 float32


def request(
    engine: BatchedEngine, prompt: list[int] | None = None, max_tokens: int = 10, priority: int = 0
) -> asyncio.Task[GenerationResult]:
    return asyncio.create_task(
        engine.generate(
            prompt or [1, 2, 3], max_tokens=max_tokens, ignore_eos=True, priority=priority
        )
    )


async def test_max_batch_size_is_never_exceeded(tiny_path: Path, batched_type: Any) -> None:
    sizes: list[int] = []

    async with batched_type(tiny_path, max_batch_size=3) as engine:
        tasks = [request(engine, [n], 10 + n) for n in range(1, 12)]
        while not all(task.done() for task in tasks):
            stats = engine.stats()
            sizes.append(max(stats.batch_size, stats.running))
            await asyncio.sleep(0)
    assert max(sizes) == 3


async def test_queue_limit_counts_those_without_a_place(
    tiny_path: Path, batched_type: Any, gate: MakeGate
) -> None:
    async with batched_type(tiny_path, max_batch_size=2, queue_limit=1) as engine:
        stop = gate("model", 3)
        tasks = [request(engine), request(engine)]
        await stop.reached()
        tasks.append(request(engine))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="queue_limit=1") as caught:
            await engine.generate([1])
        assert caught.value.retry_after > 0
        assert (engine.stats().running, engine.stats().waiting) == (2, 1)
        stop.go()
        await asyncio.gather(*tasks)
        assert engine.stats().rejected == 1
        assert engine.stats().finished == 3


async def test_queue_limit_zero_fills_the_batch(tiny_path: Path, batched_type: Any) -> None:
    async with batched_type(tiny_path, max_batch_size=4, queue_limit=0) as engine:
        outcomes = await asyncio.gather(
            *(request(engine) for _ in range(6)), return_exceptions=True
        )
        assert sum(isinstance(o, EngineBusy) for o in outcomes) == 2


async def test_max_wait_ends_waiting_not_running(
    tiny_path: Path, batched_type: Any, gate: MakeGate
) -> None:
    async with batched_type(tiny_path, max_batch_size=1, max_wait=1.0) as engine:
        stop = gate("model", 3)
        running = request(engine)
        await stop.reached()
        with pytest.raises(EngineBusy, match="max_wait"):
            await engine.generate([1])
        assert engine.stats().waiting == 0
        stop.go()
        assert len((await running).tokens) == 10


async def test_lower_priorities_go_first_and_equals_in_the_order_of_arrival(
    tiny_path: Path, batched_type: Any, gate: MakeGate
) -> None:
    async with batched_type(tiny_path, max_batch_size=1) as engine:
        stop = gate("model", 3)
        first = request(engine)
        await stop.reached()
        order: list[str] = []
        tasks = []
        for name, priority in (("a", 5), ("b", 0), ("c", -1), ("d", 0), ("e", -1)):
            task = request(engine, max_tokens=1, priority=priority)
            task.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
            tasks.append(task)
        await asyncio.sleep(0)
        stop.go()
        await asyncio.gather(first, *tasks)
    assert order == ["c", "e", "b", "d", "a"]


async def test_nobody_starves_behind_better_priorities(tiny_path: Path, batched_type: Any) -> None:
    async with batched_type(tiny_path, max_batch_size=1) as engine:
        served = 0
        over = asyncio.Event()

        async def important() -> None:
            nonlocal served
            while not over.is_set():
                await engine.generate([1], max_tokens=1, priority=-10)
                served += 1

        crowd = [asyncio.create_task(important()) for _ in range(4)]
        await until(lambda: served >= len(crowd))
        before = served
        await engine.generate([2], max_tokens=1, priority=1000)
        assert served - before <= 24
        over.set()
        await asyncio.gather(*crowd)


async def test_a_priority_must_be_an_integer_and_means_nothing_to_a_simple_engine(
    tiny_path: Path,
) -> None:
    async with BatchedEngine(tiny_path) as engine:
        for wrong in (1.5, "high", True, None):
            with pytest.raises(InvalidRequest, match="priority"):
                await engine.generate([1], priority=wrong)  # type: ignore[arg-type]
    async with SimpleEngine(tiny_path) as simple:
        with pytest.raises(InvalidRequest, match="BatchedEngine"):
            await simple.generate([1], priority=1)


@pytest.mark.parametrize(
    "make",
    [
        FakeEngine,
        lambda: SimpleEngine("demo"),
        lambda: ProcessEngine("demo"),
        lambda: EngineManager("demo"),
    ],
    ids=["fake", "simple", "process", "manager"],
)
async def test_a_priority_that_means_nothing_is_refused_when_the_request_is_made(
    make: Callable[[], BaseEngine],
) -> None:
    engine = make()  # not even started
    user = [{"role": "user", "content": "hi"}]
    for ask in (
        lambda: engine.stream_generate("a", priority=1),
        lambda: engine.stream_chat(user, priority=-1),
    ):
        with pytest.raises(InvalidRequest, match=r"^priority: .*BatchedEngine"):
            ask()
    with pytest.raises(InvalidRequest, match=r"^priority: "):
        await engine.generate_batch(["a", "b"], priority=1)
    engine.stream_generate("a", priority=0)
    for other in (FakeEngine(max_batch_size=2), ProcessEngine("demo", engine="batched")):
        other.stream_generate("a", priority=1)


async def test_a_request_that_can_never_fit_is_refused_at_once_with_both_numbers(
    tiny_path: Path,
) -> None:
    budget = 1024 * BYTES_A_TOKEN
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=budget) as engine:
        with pytest.raises(InvalidRequest, match="kv_cache_memory_bytes") as caught:
            await engine.generate([1] * 1000, max_tokens=100)
        assert str(budget) in str(caught.value)
        assert str(1280 * BYTES_A_TOKEN) in str(caught.value)
        assert len((await request(engine, [1] * 1000, 24)).tokens) == 24
        as_many_as_fit = await engine.generate([1] * 1000, max_tokens=None, ignore_eos=True)
        assert len(as_many_as_fit.tokens) == 24
        assert as_many_as_fit.finish_reason == "length"


async def test_as_many_tokens_as_fit_of_a_model_without_a_limit(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "0")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["max_position_embeddings"]
    file.write_text(json.dumps(config))
    async with BatchedEngine(folder, kv_cache_memory_bytes=1024 * BYTES_A_TOKEN) as engine:
        assert engine.context_length is None
        for length in (1024, 1500):
            with pytest.raises(InvalidRequest, match=f"{length} prompt tokens and up to 1 new"):
                await engine.generate([1] * length, max_tokens=None)
        result = await engine.generate([1] * 1020, max_tokens=None, ignore_eos=True)
        assert len(result.tokens) == 4


class Asked:
    """What a seat needs to know of a request."""

    def __init__(self, request_id: str, priority: int) -> None:
        self.request_id = request_id
        self.priority = priority

    def cancel(self) -> None:
        pass

    def result(self) -> GenerationResult:
        raise AssertionError("none of them is served")


def enter(seats: BatchQueue[Asked], request: Asked, *, ready: bool = True) -> QueuedRequest[Asked]:
    seat = QueuedRequest(request, lambda _: None, lambda: None)
    seat.ready = ready
    seats._enter(seat)
    return seat


def make_ready(seats: BatchQueue[Asked], seat: QueuedRequest[Asked]) -> None:
    seat.preparing = True
    seats.left(seat, None)


async def test_those_that_left_the_queue_are_forgotten_though_better_ones_wait() -> None:
    seats = BatchQueue[Asked](1)
    first = enter(seats, Asked("first", 0))
    gone = []
    for number in range(400):
        seat = enter(seats, Asked(str(number), 1), ready=number % 2 == 0)
        gone.append(weakref.ref(seat))
        seats._cancel(seat)
    del seat
    assert [each() for each in gone if each() is not None] == []
    for order in (seats._by_rank, seats._by_arrival):
        assert len(order._ready._heap) + len(order._unready._heap) < 60
    assert seats.first() is first


@pytest.mark.parametrize("ready", [0, 1, 2])
async def test_nobody_who_left_the_queue_is_held_when_nobody_is_left_in_it(ready: int) -> None:
    seats = BatchQueue[Asked](1)
    asked = [Asked("one", 0), Asked("other", 0)]
    entered = [enter(seats, each, ready=i < ready) for i, each in enumerate(asked)]
    assert seats.pending == bool(ready)
    for seat in entered:
        seats._cancel(seat)
    held = [weakref.ref(each) for each in asked]
    del asked, entered, seat
    assert not seats.pending
    assert [each() for each in held] == [None, None]


async def test_who_comes_first_keeps_a_place_while_it_is_made_ready() -> None:
    seats = BatchQueue[Asked](2)
    slow, quick, third = (enter(seats, Asked(n, 0), ready=n != "slow") for n in ("slow", "b", "c"))
    assert seats.first() is quick  # there is a place for each
    assert seats.take(quick)
    assert seats.first() is None  # the last one is kept
    assert not seats.take(quick)
    make_ready(seats, slow)
    assert seats.first() is slow
    seats.take(slow)
    assert seats.first() is None
    seats.end(slow.request, RuntimeError("over"))
    assert seats.first() is third


async def test_better_priorities_keep_a_place_too_and_make_room_when_they_leave() -> None:
    seats = BatchQueue[Asked](1)
    ready = enter(seats, Asked("ready", 0))
    assert seats.first() is ready
    urgent = enter(seats, Asked("urgent", -1), ready=False)
    enter(seats, Asked("idle", 1), ready=False)
    assert seats.first() is None
    seats._cancel(urgent)
    assert seats.first() is ready


async def test_a_request_that_does_not_fit_now_waits_and_stored_prompts_give_way(
    tiny_path: Path, gate: MakeGate
) -> None:
    budget = 1024 * BYTES_A_TOKEN
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=budget) as engine:
        await request(engine, [7] * 300, 4)
        await settled()
        assert engine.stats().prompt_cache.nbytes > 0
        stop = gate("model", 3)
        big = [request(engine, [n] * 400, 20) for n in (1, 2, 3)]
        await stop.reached()
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (2, 1)
        assert stats.prompt_cache.nbytes == 0
        assert stats.kv_bytes <= budget
        stop.go()
        results = await asyncio.gather(*big)
        assert [len(result.tokens) for result in results] == [20] * 3
        await settled()
        stats = engine.stats()
        assert stats.prompt_cache.nbytes + stats.kv_bytes <= budget


async def test_waiting_for_memory_is_not_busy_waiting(tiny_path: Path, gate: MakeGate) -> None:
    budget = 512 * BYTES_A_TOKEN
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=budget) as engine:
        stop = gate("model", 100_000)
        first = request(engine, [1] * 200, 200)
        second = request(engine, [2] * 200, 200)
        await asyncio.gather(first, second)
        assert stop.calls <= 2 * (1 + 200 + 1)


@pytest.mark.parametrize("width", [None, 1])
async def test_many_that_have_waited_too_long_leave_without_counting_each_other(
    width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them used to be counted by all others, in one go of the event loop."""
    looks = 0

    def waiting(pending: PendingWork[Any]) -> bool:
        nonlocal looks
        looks += 1
        return pending.stage is Stage.QUEUED

    monkeypatch.setattr(PendingWork, "waiting", property(waiting))
    held = testing.Gate()
    async with FakeEngine([held, "x"], max_batch_size=width, max_wait=1.0) as engine:
        first = asyncio.create_task(engine.generate("first"))
        await held.reached()
        others = [asyncio.create_task(engine.generate("other")) for _ in range(200)]
        errors = await asyncio.gather(*others, return_exceptions=True)
        held.open()
        await first
    assert {type(error) for error in errors} == {EngineBusy}
    assert looks < 2 * len(others)
