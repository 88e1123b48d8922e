"""Requests that share a batch: each gets what it would have got alone."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    BatchedEngine,
    EngineState,
    GenerationResult,
    InvalidRequest,
    SimpleEngine,
)
from mlx_engine.config import ModelConfig
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.generation.trials.batch import check_batchable
from tests.architectures import make
from tests.conftest import on_mlx_thread, settled
from tests.guard import GUARD, Gate
from tests.waiting import PATIENCE, turns, until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]


@pytest.fixture
async def alone(tiny_path: Path) -> AsyncIterator[SimpleEngine]:
    """What a request gets by itself, with nothing from the prompt cache."""
    async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as engine:
        yield engine


@pytest.fixture
async def engine(tiny_path: Path) -> AsyncIterator[BatchedEngine]:
    async with BatchedEngine(tiny_path, max_batch_size=8, prefill_step_size=64) as engine:
        yield engine


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(length * 1000 + seed)
    return [draw.randrange(1, 250) for _ in range(length)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_requests_that_join_and_leave_at_random_get_the_tokens_they_get_alone(
    tiny_path: Path, alone: SimpleEngine, seed: int, cached: bool
) -> None:
    draw = random.Random(seed)
    common = prompt_of(90, seed)
    work = []
    for n in range(32):
        own = prompt_of(draw.choice([1, 2, 9, 40, 150, 400]), n)
        work.append((common[: draw.randrange(90)] + own, draw.randrange(1, 40)))
    expected = [await alone.generate(p, max_tokens=n, ignore_eos=True) for p, n in work]
    limit = None if cached else 0
    async with BatchedEngine(
        tiny_path, max_batch_size=12, prefill_step_size=64, prompt_cache_bytes=limit
    ) as engine:

        async def later(prompt: list[int], max_tokens: int) -> GenerationResult:
            await asyncio.sleep(draw.random() * 0.2)
            return await engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)

        results = await asyncio.gather(*(later(*each) for each in work))
        assert [r.tokens for r in results] == [r.tokens for r in expected]
        assert [r.text for r in results] == [r.text for r in expected]
        assert (engine.stats().cached_tokens > 0) is cached
        assert engine.stats().batch_size == engine.stats().kv_bytes == 0


async def test_half_of_them_cancelled_the_others_do_not_notice(
    engine: BatchedEngine, alone: SimpleEngine
) -> None:
    draw = random.Random(7)
    work = [(prompt_of(draw.choice([3, 50, 200]), n), draw.randrange(5, 60)) for n in range(32)]
    expected = [(await alone.generate(p, max_tokens=n, ignore_eos=True)).tokens for p, n in work]
    tasks = [
        asyncio.create_task(engine.generate(p, max_tokens=n, ignore_eos=True)) for p, n in work
    ]
    for n in draw.sample(range(32), 16):
        await asyncio.sleep(draw.random() * 0.01)
        tasks[n].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result, tokens in zip(results, expected, strict=True):
        if not isinstance(result, asyncio.CancelledError):
            assert isinstance(result, GenerationResult)
            assert result.tokens == tokens
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.cancelled + stats.finished == 32


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 1.0, "seed": 3, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {65: 3.0}},
    {"logprobs": 3},
    {"stop_token_ids": list(range(0, 250, 9)), "ignore_eos": True},
    {"stop": ["e", "q"], "ignore_eos": True},
    {"ignore_eos": False},
    {},
]


async def test_every_option_is_honoured_for_each_request_of_a_batch(
    tiny_path: Path, alone: SimpleEngine
) -> None:
    prompt = prompt_of(30)
    expected = [await alone.generate(prompt, max_tokens=25, **o) for o in OPTIONS]
    async with BatchedEngine(tiny_path) as engine:
        for _ in range(2):  # the second time, the prompt comes from the prompt cache
            results = await asyncio.gather(
                *(engine.generate(prompt, max_tokens=25, **o) for o in OPTIONS)
            )
            for result, wanted in zip(results, expected, strict=True):
                assert result.tokens == wanted.tokens
                assert result.text == wanted.text
                assert result.finish_reason == wanted.finish_reason
                assert [lp.token for lp in result.logprobs] == [lp.token for lp in wanted.logprobs]
                for got, want in zip(result.logprobs, wanted.logprobs, strict=True):
                    assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
                    assert [t.token for t in got.top] == [t.token for t in want.top]


async def test_rows_that_use_the_same_filters_are_sampled_in_one_call(
    engine: BatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation import sampler

    rows: list[int] = []
    categorical = sampler._categorical

    def counted(logits: mx.array, number: mx.array) -> mx.array:
        rows.append(logits.shape[0])
        return categorical(logits, number)

    monkeypatch.setattr(sampler, "_categorical", counted)
    await asyncio.gather(
        *(
            engine.generate(
                prompt_of(5, n),
                max_tokens=10,
                temperature=0.7 + n / 100,
                top_p=0.8 + n / 100,
                seed=n if n % 2 else None,
            )
            for n in range(6)
        ),
        *(engine.generate(prompt_of(5, n), max_tokens=10, ignore_eos=True) for n in range(2)),
    )
    assert max(rows) == 6


async def test_a_long_prompt_joins_in_slices_between_the_steps_of_running_streams(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation import runner
    from mlx_engine.generation.decode_batch import DecodeBatch

    events: list[str] = []
    settle, step = runner.settle, DecodeBatch.step

    def noted_prefill(*args: Any) -> None:
        events.append("slice")
        settle(*args)

    def noted_step(self: DecodeBatch) -> Any:
        events.append("step")
        return step(self)

    monkeypatch.setattr(runner, "settle", noted_prefill)
    monkeypatch.setattr(DecodeBatch, "step", noted_step)
    engine = BatchedEngine(tiny_path, prefill_step_size=128, max_decode_pause_ms=None)
    async with (
        engine,
        engine.stream_generate([1, 2], max_tokens=3000, ignore_eos=True) as stream,
    ):
        await anext(stream)
        events.clear()
        await engine.generate(prompt_of(2000), max_tokens=2, ignore_eos=True)
    slices = [n for n, event in enumerate(events) if event == "slice"]
    assert len(slices) == 16
    assert all(b - a == 2 for a, b in itertools.pairwise(slices))


async def test_the_pause_of_decode_bounds_the_slice(tiny_path: Path) -> None:
    from mlx_engine.generation.runner import ModelRunner

    sizes: list[int] = []
    original = ModelRunner._forward

    def noted(self: Any, prompt: Any, drafter: Any, tokens: Any, *args: Any, **named: Any) -> None:
        sizes.append(tokens.shape[1])
        original(self, prompt, drafter, tokens, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "_forward", noted)
        async with BatchedEngine(tiny_path, max_decode_pause_ms=0, prompt_cache_bytes=0) as engine:
            await engine.generate(prompt_of(600), max_tokens=1)
            assert sizes == [512, 87], "nobody waits: as much as prefill_step_size"
            sizes.clear()
            async with engine.stream_generate([1, 2], max_tokens=3000, ignore_eos=True) as stream:
                await anext(stream)
                await engine.generate(prompt_of(300), max_tokens=1)
    assert set(sizes[1:-1]) == {16}


async def test_a_short_prompt_does_not_wait_for_a_long_one(tiny_path: Path) -> None:
    order: list[str] = []
    async with BatchedEngine(tiny_path, prefill_step_size=64, prompt_cache_bytes=0) as engine:

        async def one(name: str, length: int) -> None:
            await engine.generate(prompt_of(length), max_tokens=2, ignore_eos=True)
            order.append(name)

        await asyncio.gather(one("long", 4000), one("short", 40), one("middle", 300))
    assert order == ["short", "middle", "long"]


async def test_same_beginnings_are_prefilled_once_even_if_they_come_together(
    tiny_path: Path,
) -> None:
    common = prompt_of(1000)
    async with BatchedEngine(tiny_path) as engine:
        results = await asyncio.gather(
            *(engine.generate([*common, n], max_tokens=2, ignore_eos=True) for n in range(1, 7))
        )
    assert sorted(r.usage.cached_tokens for r in results) == [0, 1000, 1000, 1000, 1000, 1000]


async def test_a_reader_that_stops_reading_does_not_slow_the_others(
    engine: BatchedEngine,
) -> None:
    async with engine.stream_generate([1, 2], max_tokens=300, ignore_eos=True) as idle:
        await anext(idle)
        result = await engine.generate([3, 4], max_tokens=200, ignore_eos=True)
        assert len(result.tokens) == 200
        await until(lambda: not engine.stats().running)
        assert idle._channel is not None
        assert len(idle._channel.chunks) <= 300
        assert 1 + len([chunk async for chunk in idle]) >= 300


@pytest.mark.parametrize("closed", [False, True])
def test_requests_of_other_event_loops_go_on_when_the_driving_one_ends(
    tiny_path: Path, gate: MakeGate, told_to_stop: threading.Event, closed: bool
) -> None:
    engine = BatchedEngine(tiny_path)
    asyncio.run(engine.start())
    stop = gate("model", 6)
    begun = threading.Event()
    results: list[GenerationResult] = []

    async def survivor() -> None:
        task = asyncio.create_task(engine.generate([5, 6], max_tokens=50, ignore_eos=True))
        await asyncio.sleep(0)
        begun.set()
        results.append(await task)

    async def driver() -> None:
        task = asyncio.create_task(engine.generate([1, 2], max_tokens=5000, ignore_eos=True))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        await stop.reached()
        for other in asyncio.all_tasks():
            other._log_destroy_pending = False  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()

    def survive() -> None:
        if not closed:
            told_to_stop.wait(PATIENCE)  # by the loop, which ends
        asyncio.run(survivor())

    thread = threading.Thread(target=survive)
    if closed:
        loop.run_until_complete(driver())
        thread.start()
        assert begun.wait(PATIENCE)
        loop.close()
        stop.go()
    else:
        thread.start()
        stop.go_after(begun.is_set)
        asyncio.run(driver())
        loop.close()
    thread.join(PATIENCE)
    assert [len(result.tokens) for result in results] == [50]
    asyncio.run(engine.stop())
    assert not engine._scheduler.queue.pending


def test_no_request_depends_on_the_event_loop_of_another(tiny_path: Path) -> None:
    engine = BatchedEngine(tiny_path)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(engine.start())

    async def begin() -> asyncio.Task[GenerationResult]:
        task = asyncio.create_task(engine.generate([1, 2], max_tokens=4000, ignore_eos=True))
        while not engine.stats().running:
            await asyncio.sleep(0)
        return task

    async def others() -> list[int]:
        turn = await engine.run_blocking(lambda: 1)  # the batch makes way for it
        results = [await engine.generate([3], max_tokens=5, ignore_eos=True) for _ in range(3)]
        return [turn, *(len(result.tokens) for result in results)]

    task = first.run_until_complete(begin())  # and now this loop stands still
    assert second.run_until_complete(others()) == [1, 5, 5, 5]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        first.run_until_complete(task)
    second.run_until_complete(engine.stop())
    first.close()
    second.close()


async def test_cancelling_all_tasks_at_any_moment_leaves_an_engine_that_serves(
    engine: BatchedEngine,
) -> None:
    for pause in range(6):
        task = asyncio.create_task(engine.generate([1, 2], max_tokens=20, ignore_eos=True))
        for _ in range(pause):
            await asyncio.sleep(0)
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            if "TestRunner" not in repr(other.get_coro()):
                other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        result = await engine.generate([1], max_tokens=2, ignore_eos=True)
        assert len(result.tokens) == 2


async def test_bursts_of_several_batches_do_not_grow(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [BatchedEngine(tiny_path, prompt_cache_bytes=0) for _ in range(3)]
    calls = 0
    bursts: Counter[object] = Counter()  # calls of a model in each, while others waited

    def count(name: str) -> None:
        nonlocal calls
        if name == "model":
            calls += 1
            bursts[mlx_thread._running] += bool(mlx_thread.waiting)

    async def read(engine: BatchedEngine) -> None:
        async with engine.stream_generate([1], max_tokens=400, ignore_eos=True) as stream:
            async for _ in stream:
                pass

    for engine in engines:
        await engine.start()
    # By the clock that bursts look at, a call of a model takes 5 ms, and nothing else any time.
    monkeypatch.setattr(time, "perf_counter", lambda: 1000 + calls * 0.005)
    monkeypatch.setattr(GUARD, "hook", count)
    await asyncio.gather(*(read(engine) for engine in engines for _ in range(2)))
    monkeypatch.undo()
    for engine in engines:
        await engine.stop()
    assert sum(bursts.values()) > 800
    assert max(bursts.values()) <= 6, "each batch has 20 ms at a time"


async def test_one_caller_after_the_other_is_never_refused(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, max_wait=0, queue_limit=0) as engine:
        for _ in range(200):
            await engine.generate([1], max_tokens=1)


async def test_two_engines_share_the_thread_and_neither_starves(tiny_path: Path) -> None:
    async with (
        SimpleEngine(tiny_path, prompt_cache_bytes=0) as simple,
        BatchedEngine(tiny_path, prompt_cache_bytes=0) as batched,
    ):
        running = True

        async def keep_busy() -> None:
            while running:
                await simple.generate([1], max_tokens=30, ignore_eos=True)

        helpers = [asyncio.create_task(keep_busy()) for _ in range(2)]
        await asyncio.gather(
            *(batched.generate([n], max_tokens=150, ignore_eos=True) for n in range(1, 5))
        )
        finished = simple.stats().finished
        running = False
        await asyncio.gather(*helpers)
        assert finished >= 3, "the batch kept the thread to itself"
        assert batched.stats().finished == 4
        share = batched.stats().decode_seconds / (
            batched.stats().decode_seconds + simple.stats().decode_seconds
        )
        assert 0.15 < share < 0.9


async def test_own_mlx_functions_take_their_turn_between_the_steps(engine: BatchedEngine) -> None:
    async with engine.stream_generate([1], max_tokens=5000, ignore_eos=True) as stream:
        await anext(stream)
        for _ in range(3):
            total = await engine.run_blocking(lambda: mx.ones(10).sum().item())
            assert total == 10


async def test_a_processor_sees_the_whole_prompt_and_the_callers_context_variables(
    engine: BatchedEngine,
) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    seen: list[tuple[str, list[int]]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        assert tokens.dtype == mx.uint32
        assert logits.shape[0] == 1
        seen.append((name.get(), tokens.tolist()))  # type: ignore[arg-type]
        return logits

    async def one(who: str, prompt: list[int]) -> GenerationResult:
        name.set(who)
        return await engine.generate(
            prompt, max_tokens=3, ignore_eos=True, logits_processors=[processor]
        )

    results = await asyncio.gather(*(one(w, [n] * n) for n, w in enumerate("abc", start=1)))
    for n, (who, result) in enumerate(zip("abc", results, strict=True), start=1):
        whole = [n] * n + list(result.tokens)
        assert [tokens for w, tokens in seen if w == who] == [whole[: n + k] for k in range(3)]


async def test_waiting_for_an_engine_inside_a_processor_raises_instead_of_deadlocking(
    engine: BatchedEngine,
) -> None:
    loop = asyncio.get_running_loop()
    errors: list[str] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        inner = asyncio.run_coroutine_threadsafe(engine.generate([1], max_tokens=1), loop)
        try:
            inner.result(5)
        except RuntimeError as error:
            errors.append(str(error))
        return logits

    await engine.generate([1], max_tokens=1, logits_processors=[processor])
    assert errors
    assert "wait for itself" in errors[0]


async def test_stats_can_be_asked_for_at_any_time(engine: BatchedEngine, gate: MakeGate) -> None:
    stop = gate("model", 12)
    tasks = [
        asyncio.create_task(engine.generate(prompt_of(20, n), max_tokens=20, ignore_eos=True))
        for n in range(10)
    ]
    await stop.reached()
    stats = await asyncio.to_thread(engine.stats)
    assert (stats.running, stats.waiting, stats.batch_size) == (8, 2, 8)
    assert stats.kv_bytes > 0
    assert stats.completion_tokens > 0
    assert stats.tokens_per_second > 0
    stop.go()
    await asyncio.gather(*tasks)
    stats = engine.stats()
    assert stats.finished == 10
    assert stats.completion_tokens == 200
    assert stats.prefill_seconds > 0
    assert stats.kv_bytes == 0
    assert stats.prompt_cache.nbytes > 0


async def test_a_cancel_in_prefill_frees_the_place_within_one_slice(
    tiny_path: Path, gate: MakeGate
) -> None:
    async with BatchedEngine(tiny_path, prefill_step_size=16, max_batch_size=1) as engine:
        stop = gate("model", 4)
        long = asyncio.create_task(engine.generate(prompt_of(2000), max_tokens=2))
        await stop.reached()
        next_one = asyncio.create_task(engine.generate([1], max_tokens=1))
        await turns()
        long.cancel()
        await turns()
        stop.go()
        with pytest.raises(asyncio.CancelledError):
            await long
        await next_one
        assert stop.calls == 5, "one slice of the next request's, and none of the cancelled one's"
        await settled()
        retry = await engine.generate(prompt_of(2000), max_tokens=2)
        assert retry.usage.cached_tokens == 64, "what was prefilled is not prefilled again"


async def test_an_infinite_pause_is_no_limit(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, max_decode_pause_ms=math.inf) as engine:
        answers = [
            engine.generate(prompt_of(700, n), max_tokens=40, ignore_eos=True) for n in range(4)
        ]
        for result in await asyncio.gather(*answers):
            assert len(result.tokens) == 40


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_size", 2.5),
        ("max_decode_pause_ms", -1),
        ("max_decode_pause_ms", "fast"),
        ("kv_cache_memory_bytes", 0),
        ("kv_bits", 4),
        ("max_kv_size", 100),
        ("prompt_cache_bytes", -1),
    ],
)
async def test_options_that_a_batch_cannot_honour_are_refused(
    tiny_path: Path, option: str, value: object
) -> None:
    with pytest.raises(InvalidRequest, match=option):
        BatchedEngine(tiny_path, **{option: value})  # type: ignore[arg-type]


async def test_a_loaded_prompt_cache_keeps_within_the_memory_budget(
    tiny_path: Path, tmp_path: Path
) -> None:
    async with SimpleEngine(tiny_path) as simple:
        for n in range(5):
            await simple.generate(prompt_of(300, n), max_tokens=1)
        await simple.save_prompt_cache(tmp_path / "cache")
        size = simple.stats().prompt_cache.nbytes
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=size // 2) as engine:
        await engine.load_prompt_cache(tmp_path / "cache")
        assert 0 < engine.stats().prompt_cache.nbytes <= size // 2


async def test_a_model_that_mlx_lm_batches_wrongly_is_refused_at_the_start(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models.cache import BatchKVCache

    extend = BatchKVCache.extend

    def forgetful(self: BatchKVCache, other: BatchKVCache) -> None:
        extend(self, other)
        self.offset = mx.zeros_like(self.offset) + self._idx  # as if no row were padded

    monkeypatch.setattr(BatchKVCache, "extend", forgetful)
    engine = BatchedEngine(tiny_path)
    with pytest.raises(InvalidRequest, match="in a batch its logits are others than alone"):
        await engine.start()
    assert engine.state is EngineState.CREATED
    monkeypatch.undo()
    async with engine:
        assert len((await engine.generate([1], max_tokens=2, ignore_eos=True)).tokens) == 2


@pytest.mark.parametrize("architecture", ["afm7", "minimax_m3_vl"])
@on_mlx_thread
def test_and_so_is_one_of_which_the_trial_does_not_see_that(architecture: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^model: its .* a batch.*; use SimpleEngine"):
        check_batchable(make(architecture), ModelConfig(model="tiny"))


async def test_the_batch_is_dropped_on_the_mlx_thread_and_nothing_waits(
    engine: BatchedEngine,
) -> None:
    await engine.generate([1, 2], max_tokens=2)
    await engine.stop()
    assert engine._holder._batch is None
    assert not mlx_thread.busy
