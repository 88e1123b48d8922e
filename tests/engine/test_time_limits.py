"""timeout= and max_wait= of a request: what it may take, and how long it may wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    DraftModel,
    EngineBusy,
    InvalidRequest,
    ProcessEngine,
    SimpleEngine,
)
from mlx_engine.core import request as core_request
from mlx_engine.testing import FakeEngine
from mlx_engine.testing import Gate as PlayGate
from tests.conftest import settled
from tests.guard import Gate
from tests.waiting import until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
HI = [{"role": "user", "content": "hi"}]
FOR_EVER: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}


async def test_the_answer_is_what_there_is_when_its_time_is_over(engine: BaseEngine) -> None:
    result = await engine.generate("abc", timeout=0.4, **FOR_EVER)
    assert result.finish_reason == "timeout"
    assert 0 < len(result.tokens) < 1500
    assert result.text
    worked = result.timings.total - result.timings.queued
    assert worked >= 0.4
    whole = await engine.generate("abc", max_tokens=len(result.tokens), ignore_eos=True)
    assert result.tokens == whole.tokens
    assert engine.stats().cancelled == 0
    await settled()
    assert engine.stats().running == 0


async def test_streams_and_chats_end_in_the_same_way(engine: BaseEngine) -> None:
    async with engine.stream_chat(HI, timeout=0.1, **FOR_EVER) as stream:
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].finish_reason == stream.result.finish_reason == "timeout"
    assert tuple(t for chunk in chunks for t in chunk.tokens) == stream.result.tokens
    (batched,) = await engine.generate_batch([HI], timeout=0.05, **FOR_EVER)
    assert getattr(batched, "finish_reason", None) == "timeout"
    (outcome,) = [o async for o in engine.map([HI], timeout=0.05, **FOR_EVER)]
    assert outcome.unwrap().finish_reason == "timeout"
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 4000}
    typed = await engine.generate("a", output=schema, timeout=0.05, max_tokens=1500)
    assert (typed.finish_reason, typed.parsed) == ("timeout", None)
    assert "cut by its timeout" in typed.notes[-1]


async def test_time_in_the_queue_does_not_count(simple_type: Any, tiny_path: Path) -> None:
    async with simple_type(tiny_path) as engine:
        ahead = asyncio.create_task(engine.generate("a", timeout=0.3, **FOR_EVER))
        await until(lambda: engine.stats().running == 1)
        behind = await engine.generate("abc", timeout=0.3, **FOR_EVER)
        assert behind.timings.queued > 0.15
        assert behind.finish_reason == "timeout"
        assert len(behind.tokens) > 0
        await ahead


async def test_it_holds_in_the_prefill_and_what_was_prefilled_is_kept(
    engine_type: Any, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_type(tiny_path, prefill_step_size=16) as engine:
        done: list[int] = []
        clock = time.perf_counter
        ahead = 0.0
        monkeypatch.setattr(core_request.time, "perf_counter", lambda: clock() + ahead)

        def progress(told: Any) -> None:
            nonlocal ahead
            done.append(told.done)
            ahead = 1000.0 if told.done >= 64 else 0.0

        prompt = [1 + n % 200 for n in range(1600)]
        result = await engine.generate(prompt, timeout=500, on_progress=progress, **FOR_EVER)
        assert (result.finish_reason, result.tokens) == ("timeout", ())
        assert done[-1] < 1599
        monkeypatch.undo()
        again = await engine.generate(prompt, max_tokens=1)
        assert again.usage.cached_tokens >= 64


async def test_of_a_cancel_and_a_time_limit_at_once_the_cancel_is_told(
    engine: BaseEngine, gate: MakeGate
) -> None:
    stop = gate("model", 1)
    task = asyncio.create_task(engine.generate("abc", timeout=0.5, **FOR_EVER))
    await stop.reached()
    await asyncio.sleep(0.6)
    task.cancel()
    await asyncio.sleep(0)
    stop.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled()
    assert (await engine.generate("a", max_tokens=1)).finish_reason == "length"


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine])
async def test_with_a_draft_model_too(kind: Any, tiny_path: Path) -> None:
    async with kind(tiny_path, decode=DraftModel(tiny_path, 2)) as engine:
        result = await engine.generate("abc", timeout=0.1, **FOR_EVER)
        assert result.finish_reason == "timeout"


async def test_they_travel_to_another_process(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        result = await engine.generate("abc", timeout=0.4, **FOR_EVER)
        assert result.finish_reason == "timeout"
        assert result.text
        ahead = asyncio.create_task(engine.generate("a", **FOR_EVER))
        await until(lambda: engine.stats().running == 1)
        with pytest.raises(EngineBusy, match=r"max_wait"):
            await engine.generate("b", max_wait=0)
        ahead.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ahead


@pytest.mark.parametrize("batch", [None, 1])
async def test_max_wait_is_of_the_queue_and_the_smaller_one_counts(batch: int | None) -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=batch, max_wait=60) as engine:
        ahead = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        with pytest.raises(EngineBusy, match=r"waited for 0.02 s \(max_wait\)"):
            await engine.generate("y", max_wait=0.02)
        with pytest.raises(EngineBusy, match=r"^no place is free now \(max_wait=0\)"):
            await engine.chat(HI, max_wait=0)
        behind = asyncio.create_task(engine.generate("z", max_wait=math.inf, timeout=math.inf))
        await until(lambda: engine.stats().waiting == 1)
        assert engine.stats().rejected == 2
        gate.open()
        assert (await behind).finish_reason == "stop"
        await ahead
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=batch, max_wait=0.02) as engine:
        ahead = asyncio.create_task(engine.generate("x"))
        await gate.reached()
        with pytest.raises(EngineBusy, match=r"waited for 0.02 s \(max_wait\)"):
            await engine.generate("y", max_wait=60)
        gate.open()
        await ahead
        assert (await engine.generate("y", max_wait=0)).finish_reason == "stop"


async def test_a_gate_of_a_fake_is_left_when_the_time_is_over() -> None:
    gate = PlayGate()
    async with FakeEngine(["one", gate, "two"], max_batch_size=2) as engine:
        result = await engine.generate("x", timeout=0.2)
        assert (result.text, result.finish_reason) == ("one", "timeout")
        assert engine.requests[0].timeout == 0.2
        assert engine.requests[0].outcome == "finished"


@pytest.mark.parametrize("limit", [0, -1, "5", True, math.nan])
async def test_what_is_no_time_is_refused(limit: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout: must be seconds of work"):
        await FakeEngine().generate("a", timeout=limit)
    if limit != 0:
        with pytest.raises(InvalidRequest, match=r"^max_wait: must be seconds"):
            FakeEngine().stream_chat(HI, max_wait=limit)
