"""Memory that requests reserve as they grow, and who makes room when it is short."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_engine import (
    BatchedEngine,
    EngineDead,
    EngineState,
    EngineStopped,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    SimpleEngine,
)
from tests.conftest import settled
from tests.engine.pools import Moments, Shut, Watched, begin_with, give
from tests.engine.test_batch_admission import BYTES_A_TOKEN
from tests.guard import GUARD
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

CONTEXT = 768
FULL = CONTEXT * BYTES_A_TOKEN
UNIT = 256 * BYTES_A_TOKEN  # by which a row grows


def prompt_of(seed: int, length: int = 20) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 250) for _ in range(length)]


async def as_many_as_fit(
    folder: Path, pool: Watched, widths: list[int]
) -> tuple[list[GenerationResult], int]:
    """What 32 requests without a limit get, and how many were preempted."""
    engine = BatchedEngine(folder, context_length=CONTEXT, max_batch_size=32)
    async with begin_with(engine, lambda: pool):
        tasks = [
            asyncio.create_task(engine.generate(prompt_of(n), max_tokens=None, ignore_eos=True))
            for n in range(32)
        ]
        while not all(task.done() for task in tasks):
            stats = engine.stats()
            widths.append(stats.batch_size)
            assert stats.kv_bytes <= pool.peak
            await asyncio.sleep(0.002)
        return [task.result() for task in tasks], engine.stats().preemptions


async def test_32_without_a_limit_run_as_wide_as_they_are_long_and_all_end(
    tiny_path: Path,
) -> None:
    widths: list[int] = []
    wide = Watched(40 * FULL)
    expected, preemptions = await as_many_as_fit(tiny_path, wide, widths)
    assert (max(widths), preemptions) == (32, 0)
    assert wide.peak <= 40 * FULL
    async with SimpleEngine(tiny_path, context_length=CONTEXT, prompt_cache_bytes=0) as simple:
        for n in (0, 31):
            alone = await simple.generate(prompt_of(n), max_tokens=None, ignore_eos=True)
            assert len(alone.tokens) == CONTEXT - 20
            assert alone.tokens == expected[n].tokens

    widths.clear()
    narrow = Watched(4 * FULL)
    results, preemptions = await as_many_as_fit(tiny_path, narrow, widths)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert narrow.peak <= 4 * FULL
    assert max(widths) == 6, "as many as have room for two steps each"
    paused = [result for result in results if result.timings.preempted]
    assert preemptions >= len(paused) > 0
    assert all("preempted" in " ".join(result.notes) for result in paused)
    assert not results[0].timings.preempted, "the oldest always progresses"


async def test_what_is_claimed_is_what_the_caches_take(tiny_path: Path) -> None:
    """A claim covers what is there at any time, and by not more than a step a row."""
    pool = Watched(None)
    engine = BatchedEngine(tiny_path, max_batch_size=8, prefill_step_size=64, prompt_cache_bytes=0)
    async with begin_with(engine, lambda: pool):
        batch = engine._holder.batch()
        seen: list[tuple[int, int, int]] = []
        measure = batch._measure

        def look() -> None:
            measure()
            rows = len(batch._working)
            seen.append((rows, batch._runner.counters.kv_bytes, pool._parts.get("live", 0)))

        batch._measure = look  # type: ignore[method-assign]
        await asyncio.gather(
            *(
                engine.generate(prompt_of(n, 30 + 90 * n), max_tokens=100 + n, ignore_eos=True)
                for n in range(6)
            )
        )
    assert max(rows for rows, _, _ in seen) == 6
    for _, held, claimed in seen:
        assert held <= claimed or not claimed


async def test_the_youngest_of_the_lowest_priority_makes_room_and_comes_back_first(
    tiny_path: Path,
) -> None:
    ends: list[str] = []
    pool = Watched(8 * UNIT)  # two steps for three, three steps for two
    engine = BatchedEngine(tiny_path, max_batch_size=4, prompt_cache_bytes=0)
    async with begin_with(engine, lambda: pool):

        async def ask(name: str, seed: int, priority: int, tokens: int) -> GenerationResult:
            result = await engine.generate(
                prompt_of(seed), max_tokens=tokens, ignore_eos=True, priority=priority
            )
            ends.append(name)
            return result

        tasks = []
        for n, (name, priority) in enumerate([("first", 0), ("low", 1), ("young", 0)]):
            tasks.append(asyncio.create_task(ask(name, n, priority, 600 + 100 * (name == "low"))))
            await until(lambda n=n: engine.stats().batch_size == n + 1)  # type: ignore[misc]
        await until(lambda: engine.stats().preemptions == 1)
        late = [
            asyncio.create_task(ask("late", 4, 1, 5)),
            asyncio.create_task(ask("later, and lower", 5, 2, 5)),
            asyncio.create_task(ask("urgent", 6, -1, 5)),
        ]
        results = await asyncio.gather(*tasks, *late)
        alone = await engine.generate(prompt_of(1), max_tokens=700, ignore_eos=True)
    assert [bool(result.timings.preempted) for result in results] == [False, True, *[False] * 4]
    assert results[1].tokens == alone.tokens
    assert "preempted once" in " ".join(results[1].notes)
    assert set(ends[:2]) <= {"first", "young", "urgent"}, "nobody is let in before it is back"


async def paused(engine: BatchedEngine, pool: Shut) -> asyncio.Task[GenerationResult]:
    """A request that is paused in the middle of its answer."""
    begun = asyncio.Event()
    before = engine.stats().preemptions

    async def ask() -> GenerationResult:
        async with engine.stream_generate(prompt_of(1), max_tokens=400, ignore_eos=True) as stream:
            async for _ in stream:
                begun.set()
        return stream.result

    task = asyncio.create_task(ask())
    await begun.wait()
    pool.shut = True
    await until(lambda: engine.stats().preemptions > before)
    await until(lambda: engine.stats().kv_bytes == 0)
    assert engine.stats().running == 1
    return task


async def test_one_that_is_cancelled_while_it_is_paused_leaves_nothing(tiny_path: Path) -> None:
    pool = Shut()
    async with begin_with(BatchedEngine(tiny_path), lambda: pool) as engine:
        task = await paused(engine, pool)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats().running == 0
        pool.shut = False
        result = await engine.generate(prompt_of(2), max_tokens=3, ignore_eos=True)
        assert len(result.tokens) == 3


async def test_one_that_is_paused_goes_on_when_there_is_room(tiny_path: Path) -> None:
    pool = Shut()
    async with begin_with(BatchedEngine(tiny_path), lambda: pool) as engine:
        expected = await engine.generate(prompt_of(1), max_tokens=400, ignore_eos=True)
        task = await paused(engine, pool)
        await engine.run_blocking(lambda: None)  # others use MLX meanwhile
        pool.shut = False
        result = await task
        assert result.tokens == expected.tokens
        assert 0 < result.timings.preempted < result.timings.decode


@pytest.mark.parametrize("timeout", [0, 0.2])
async def test_a_shutdown_ends_one_that_is_paused(tiny_path: Path, timeout: float) -> None:
    pool = Shut()
    engine = begin_with(BatchedEngine(tiny_path), lambda: pool)
    await engine.start()
    task = await paused(engine, pool)
    report = await engine.shutdown(timeout)
    assert len(report.aborted) == 1
    with pytest.raises(EngineStopped):
        await task


async def test_a_shutdown_waits_for_one_that_is_paused(tiny_path: Path) -> None:
    pool = Shut()
    engine = begin_with(BatchedEngine(tiny_path), lambda: pool)
    await engine.start()
    task = await paused(engine, pool)
    leaving = asyncio.create_task(engine.shutdown(None))
    await until(lambda: engine.state is EngineState.DRAINING)
    pool.shut = False
    assert len((await task).tokens) == 400
    assert not (await leaving).aborted


@pytest.mark.parametrize("pause", range(12))
async def test_one_that_is_cancelled_while_it_is_preempted_costs_nobody_anything(
    tiny_path: Path, pause: int
) -> None:
    async with BatchedEngine(tiny_path, prefill_step_size=16) as engine:
        expected = (await engine.generate(prompt_of(5), max_tokens=30, ignore_eos=True)).tokens
        give(engine, Moments(lambda look: look % 5 == 0))
        other = asyncio.create_task(engine.generate(prompt_of(5), max_tokens=30, ignore_eos=True))
        task = asyncio.create_task(
            engine.generate(prompt_of(6, 60), max_tokens=300, ignore_eos=True)
        )
        await until(lambda: engine.stats().preemptions > pause)
        for _ in range(pause):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).tokens == expected
        assert engine.stats().running == 0


# ── faults ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Any:
    yield
    GUARD.hook = None


@pytest.mark.parametrize("method", ["extract", "filter", "extend"])
@pytest.mark.parametrize("at", [1, 2, 3])
async def test_a_cache_that_fails_while_one_makes_room_costs_nobody_an_answer(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    from mlx_lm.models.cache import BatchKVCache

    async with BatchedEngine(tiny_path, max_batch_size=4) as engine:
        expected = [
            (await engine.generate(prompt_of(n), max_tokens=40, ignore_eos=True)).tokens
            for n in range(3)
        ]
        await settled()
        original, calls = getattr(BatchKVCache, method), 0

        def sometimes(self: object, *args: object) -> Any:
            nonlocal calls
            if engine.stats().preemptions or pool.looks >= 20:
                calls += 1
                if calls == at:
                    raise RuntimeError("out of memory")
            return original(self, *args)

        monkeypatch.setattr(BatchKVCache, method, sometimes)
        pool = Moments(lambda look: look in (20, 34))
        give(engine, pool)
        outcomes = await asyncio.gather(
            *(engine.generate(prompt_of(n), max_tokens=40, ignore_eos=True) for n in range(3)),
            return_exceptions=True,
        )
        assert engine.state is EngineState.RUNNING
        failed = [each for each in outcomes if isinstance(each, BaseException)]
        assert len(failed) <= 1
        assert all("out of memory" in str(error) for error in failed)
        for outcome, tokens in zip(outcomes, expected, strict=True):
            if isinstance(outcome, GenerationResult):
                assert outcome.tokens == tokens
        await settled()
        assert engine.stats().running == engine.stats().kv_bytes == 0
        again = await engine.generate(prompt_of(0), max_tokens=40, ignore_eos=True)
        assert again.tokens == expected[0]


async def test_a_fault_on_the_way_back_costs_only_the_one_that_comes_back(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation.runner import ModelRunner

    async with BatchedEngine(tiny_path, max_batch_size=4, prompt_cache_bytes=0) as engine:
        expected = [
            (await engine.generate(prompt_of(n), max_tokens=60, ignore_eos=True)).tokens
            for n in range(3)
        ]
        original = ModelRunner.prefill_step

        def failing(self: ModelRunner, sequence: Any, size: int) -> int:
            if sequence.returns:
                raise RuntimeError("no memory for such a chunk")
            return original(self, sequence, size)

        monkeypatch.setattr(ModelRunner, "prefill_step", failing)
        give(engine, Moments(lambda look: look == 25))
        outcomes = await asyncio.gather(
            *(engine.generate(prompt_of(n), max_tokens=60, ignore_eos=True) for n in range(3)),
            return_exceptions=True,
        )
        assert [isinstance(each, GenerationError) for each in outcomes].count(True) == 1
        assert isinstance(outcomes[2], GenerationError)
        assert "no memory for such a chunk" in str(outcomes[2])
        assert [each.tokens for each in outcomes[:2] if isinstance(each, GenerationResult)] == (
            expected[:2]
        )


async def test_an_engine_that_fails_tells_one_that_is_paused(tiny_path: Path) -> None:
    pool = Shut()
    async with begin_with(BatchedEngine(tiny_path), lambda: pool) as engine:
        task = await paused(engine, pool)

        def hook(name: str) -> None:
            if name == "model":
                raise RuntimeError("the device is lost")

        GUARD.hook = hook
        pool.shut = False
        with pytest.raises(EngineDead, match="the device is lost"):
            await task
        GUARD.hook = None


# ── random programs ─────────────────────────────────────────────────────────────────────────

REQUEST = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "length": st.sampled_from([1, 9, 60, 250, 400]),
        "tokens": st.sampled_from([0, 1, 5, 70, 300, None]),
        "priority": st.integers(0, 2),
        "cancelled": st.one_of(st.none(), st.none(), st.integers(0, 300)),
    }
)


@pytest.fixture(scope="module")
async def longest(tiny_path: Path) -> Callable[[int, int], Any]:
    """What a prompt gives, as far as a small context goes."""
    known: dict[tuple[int, int], tuple[int, ...]] = {}

    async def answer(seed: int, length: int) -> tuple[int, ...]:
        if (seed, length) not in known:
            async with SimpleEngine(tiny_path, context_length=768, prompt_cache_bytes=0) as simple:
                result = await simple.generate(
                    prompt_of(seed, length), max_tokens=None, ignore_eos=True
                )
            known[seed, length] = result.tokens
        return known[seed, length]

    return answer


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(program=st.lists(REQUEST, min_size=2, max_size=12), contexts=st.sampled_from([1, 2, 3]))
async def test_any_requests_on_little_memory_end_with_the_right_tokens(
    tiny_path: Path,
    longest: Callable[[int, int], Any],
    program: list[dict[str, Any]],
    contexts: int,
) -> None:
    limit = contexts * 768 * BYTES_A_TOKEN
    pool = Watched(limit)
    engine = BatchedEngine(tiny_path, context_length=768, max_batch_size=6, prefill_step_size=64)

    async def ask(each: dict[str, Any]) -> GenerationResult | None:
        task = asyncio.create_task(
            engine.generate(
                prompt_of(each["seed"], each["length"]),
                max_tokens=each["tokens"],
                ignore_eos=True,
                priority=each["priority"],
            )
        )
        if each["cancelled"] is not None:
            for _ in range(each["cancelled"]):
                await asyncio.sleep(0.0005)
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    async with begin_with(engine, lambda: pool):
        batch = engine._holder.batch()
        keep = batch._keep_within_memory

        def watched() -> Any:
            """The first in rank of all that have a place is never preempted."""
            everybody = [*batch._working, *batch._preempted.sequences]
            first = min(everybody, key=lambda sequence: sequence.rank, default=None)
            progresses = first in batch._working
            yield from keep()
            assert not (progresses and first in batch._preempted.sequences)

        batch._keep_within_memory = watched  # type: ignore[method-assign]
        results = await asyncio.gather(*map(ask, program))
        await settled()
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.batch_size == stats.kv_bytes == 0
        assert pool.peak <= limit
        assert pool._parts.get("live", 0) == 0
        assert pool._parts.get("stored", 0) == engine._holder.runner().stored_bytes
    for each, result in zip(program, results, strict=True):
        if result is None:
            assert each["cancelled"] is not None
            continue
        expected = await longest(each["seed"], each["length"])
        count = len(expected) if each["tokens"] is None else each["tokens"]
        assert result.tokens == expected[:count]


async def test_a_request_that_could_never_finish_is_refused_with_both_numbers(
    tiny_path: Path,
) -> None:
    limit = 512 * BYTES_A_TOKEN
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=limit) as engine:
        with pytest.raises(InvalidRequest, match="kv_cache_memory_bytes") as caught:
            await engine.generate(prompt_of(1, 400), max_tokens=200)
        assert str(limit) in str(caught.value)
        assert str(768 * BYTES_A_TOKEN) in str(caught.value)
        result = await engine.generate(prompt_of(1, 400), max_tokens=None, ignore_eos=True)
        assert len(result.tokens) == 112
