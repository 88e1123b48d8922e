"""generate_batch: a list in, a list out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    BaseEngine,
    ContextLengthExceeded,
    EngineNotStarted,
    EngineStopped,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    Progress,
    SamplingParams,
)
from mlx_engine.testing import FakeEngine
from mlx_engine.testing import Gate as PlayGate
from tests.conftest import settled
from tests.guard import Gate
from tests.waiting import turns

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]


def broken(tokens: mx.array, logits: mx.array) -> mx.array:
    raise ZeroDivisionError


async def test_results_come_in_order_and_each_failure_is_its_own(engine: BaseEngine) -> None:
    seen: list[Progress] = []
    prompts = ["one", [2, 3], [99999], [1] * 20000, "", "six"]
    params = [SamplingParams(max_tokens=n + 1) for n in range(5)]
    params.append(SamplingParams(max_tokens=3, logits_processors=[broken]))
    results = await engine.generate_batch(prompts, params, ignore_eos=True, on_progress=seen.append)
    await asyncio.sleep(0)
    for n in (0, 1):
        result = results[n]
        assert isinstance(result, GenerationResult)
        assert len(result.tokens) == n + 1
        single = await engine.generate(prompts[n], params[n], ignore_eos=True)
        assert result.tokens == single.tokens
    assert isinstance(results[2], InvalidRequest)
    assert isinstance(results[3], ContextLengthExceeded)
    assert isinstance(results[4], InvalidRequest)
    assert isinstance(results[5], GenerationError)
    assert [p.done for p in seen] == [1, 2, 3, 4, 5, 6]
    assert {(p.phase, p.total) for p in seen} == {("batch", 6)}


async def test_a_long_list_stays_within_the_queue_limit(
    engine_type: type[BaseEngine], tiny_path: str
) -> None:
    async with engine_type(tiny_path, queue_limit=0) as engine:
        results = await engine.generate_batch([[n] for n in range(1, 100)], max_tokens=2)
        assert all(isinstance(result, GenerationResult) for result in results)
        assert engine.stats().rejected == 0


async def test_an_empty_list(engine: BaseEngine) -> None:
    assert await engine.generate_batch([]) == []


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_it_cancels_all_and_waits_for_them(
    engine: BaseEngine, gate: MakeGate, times: int
) -> None:
    stop = gate("model", 6)
    task = asyncio.create_task(
        engine.generate_batch([[n] for n in range(1, 50)], max_tokens=500, ignore_eos=True)
    )
    await stop.reached()
    for _ in range(times):
        task.cancel()
        await turns()
        assert not task.done()
    stop.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled()
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.finished == 0
    assert (await engine.generate([1], max_tokens=2, ignore_eos=True)).finish_reason == "length"


async def test_stopped_meanwhile_each_request_says_so(engine: BaseEngine, gate: MakeGate) -> None:
    stop = gate("model", 6)
    task = asyncio.create_task(
        engine.generate_batch([[n] for n in range(1, 50)], max_tokens=500, ignore_eos=True)
    )
    await stop.reached()
    stopping = asyncio.create_task(engine.stop())
    await turns()
    stop.go()
    await stopping
    assert all(isinstance(result, EngineStopped) for result in await task)


async def test_what_is_wrong_with_all_of_them_is_raised(
    engine: BaseEngine, tiny_engine: BaseEngine
) -> None:
    for prompts in ("text", b"text", 5, {"a": 1}):
        with pytest.raises(InvalidRequest, match="prompts"):
            await engine.generate_batch(prompts)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="2 for 1"):
        await engine.generate_batch(["a"], [SamplingParams(), SamplingParams()])
    with pytest.raises(InvalidRequest, match="params"):
        await engine.generate_batch(["a"], "greedy")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="temperature"):
        await engine.generate_batch(["a"], temperature=-1.0)


async def test_before_the_start_it_raises(tiny_engine: BaseEngine) -> None:
    with pytest.raises(EngineNotStarted):
        await tiny_engine.generate_batch(["a"])


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("options", [{"queue_limit": 0}, {"queue_limit": 1}, {"max_wait": 0}])
async def test_where_others_have_the_places_a_batch_waits_for_its_own(
    batch: int | None, options: dict[str, Any]
) -> None:
    gates = {f"other {i}": PlayGate() for i in range(2)}
    answers = {prompt: ["a", gate, "b"] for prompt, gate in gates.items()}
    answers |= {f"mine {i}": ["mine"] for i in range(6)}
    async with FakeEngine(answers, max_batch_size=batch, **options) as engine:
        others = [asyncio.create_task(engine.generate("other 0"))]
        await gates["other 0"].reached()
        if batch == 2:
            others.append(asyncio.create_task(engine.generate("other 1")))
            await gates["other 1"].reached()
        many = asyncio.create_task(engine.generate_batch([f"mine {i}" for i in range(6)]))
        while not any(r.outcome == "refused" for r in engine.requests):
            await asyncio.sleep(0)
        assert not many.done()
        for gate in gates.values():
            gate.open()
        assert [r.text for r in await many if isinstance(r, GenerationResult)] == ["mine"] * 6
        await asyncio.gather(*others)


async def test_a_batch_that_waits_for_others_can_be_cancelled_and_stopped() -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], queue_limit=0) as engine:
        other = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        many = asyncio.create_task(engine.generate_batch(["a", "b"]))
        while len(engine.requests) < 3:
            await asyncio.sleep(0)
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        many = asyncio.create_task(engine.generate_batch(["a", "b"]))
        while len(engine.requests) < 5:
            await asyncio.sleep(0)
        await engine.stop()
        assert all(isinstance(end, EngineStopped) for end in await many)
        with pytest.raises(EngineStopped):
            await other


@pytest.mark.parametrize(("batch", "ahead"), [(None, 1), (1, 1), (4, 2), (8, 3)])
async def test_a_few_wait_so_that_a_batch_is_always_full(batch: int | None, ahead: int) -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=batch) as engine:
        many = asyncio.create_task(engine.generate_batch([str(i) for i in range(50)]))
        await gate.reached()
        while (stats := engine.stats()).running < (batch or 1) or stats.waiting < ahead:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.stats().waiting == ahead
        gate.open()
        assert len(await many) == 50


async def test_parameters_are_made_once_and_the_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = 0
    inner = SamplingParams.__post_init__

    def counted(self: SamplingParams) -> None:
        nonlocal made
        made += 1
        inner(self)

    async with FakeEngine("a", max_batch_size=8) as engine:
        monkeypatch.setattr(SamplingParams, "__post_init__", counted)
        prompts = [str(i) for i in range(500)]
        await engine.generate_batch(prompts, temperature=0.5)
        assert made <= 2
        each = [SamplingParams(seed=i) for i in range(500)]
        made, before = 0, len(engine.requests)
        many = asyncio.create_task(engine.generate_batch(prompts, each, max_tokens=3))
        turns = 0
        while len(engine.requests) == before:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 500 // 32
        assert made == 500
        assert [r.params.seed for r in engine.requests[before:]] == list(range(500))[
            : len(engine.requests) - before
        ]
        await many
