"""generate_batch: a list in, a list out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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
