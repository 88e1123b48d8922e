"""Requests that make room for others, and come back: nobody can tell it from their tokens."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    MTP,
    BatchedEngine,
    DraftModel,
    GenerationResult,
    SamplingParams,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.constraints import JSONSchema, Regex
from mlx_engine.requests import ChatPrompt, GenerationRequest
from tests.conftest import make_tiny, settled
from tests.engine.pools import Moments, give
from tests.engine.test_families import FAMILIES
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO, QWEN_NEXT

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

DRAW = random.Random(11)
PROMPT = [DRAW.randrange(1, 250) for _ in range(70)]
LONG = [DRAW.randrange(1, 250) for _ in range(300)]
FREE: dict[str, Any] = {"max_tokens": 14, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}

Ask = Callable[[BatchedEngine], Awaitable[GenerationResult]]


def options(**other: Any) -> Ask:
    return lambda engine: engine.generate(PROMPT, **{**FREE, **other})


async def reasoning(engine: BatchedEngine) -> GenerationResult:
    messages = [{"role": "user", "content": "Name a colour, and say why it is one."}]
    source = ChatPrompt.of(messages, None, {"enable_thinking": "open"}, max_reasoning_tokens=5)
    return await engine.submit(GenerationRequest(source, SamplingParams(**FREE))).run(None)


async def streamed(engine: BatchedEngine) -> GenerationResult:
    text = ""
    tokens: list[int] = []
    async with engine.stream_generate(PROMPT, **FREE, logprobs=1) as stream:
        async for chunk in stream:
            text += chunk.text
            tokens += chunk.tokens
    assert (stream.result.text, stream.result.tokens) == (text, tuple(tokens))
    return stream.result


ASKS: dict[str, Ask] = {
    "greedy": options(),
    "seeded": options(temperature=0.9, seed=3, top_k=40, top_p=0.95),
    "xtc": options(temperature=1.0, seed=4, xtc_probability=0.5, xtc_threshold=0.05),
    "logprobs": options(logprobs=3),
    "penalties": options(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    "schema": options(constraint=JSONSchema(SCHEMA), max_tokens=40),
    "forced text": options(constraint=Regex('[{]"a long key": [0-9]{3}}'), temperature=1.0, seed=2),
    "reasoning": reasoning,
    "streamed": streamed,
}


async def forget(engine: BatchedEngine) -> None:
    """Empty the prompt caches, so that the same happens again."""
    runner = engine._holder.runner()
    caches = [runner.prompt_cache, *(cache for cache, _ in runner.strategies.side_caches)]
    await engine.run_blocking(lambda: [cache.clear() for cache in caches])
    await settled()


def check_same(result: GenerationResult, expected: GenerationResult) -> None:
    assert result.tokens == expected.tokens
    assert (result.text, result.reasoning) == (expected.text, expected.reasoning)
    assert result.finish_reason == expected.finish_reason
    assert result.stop_string == expected.stop_string
    assert [each.token for each in result.logprobs] == [each.token for each in expected.logprobs]
    for got, wanted in zip(result.logprobs, expected.logprobs, strict=True):
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [each.token for each in got.top] == [each.token for each in wanted.top]
    assert result.usage.prompt_tokens == expected.usage.prompt_tokens
    assert result.usage.kept_ranges == expected.usage.kept_ranges


async def sweep(
    engine: BatchedEngine, ask: Ask, *, every: int = 1, periods: tuple[int, ...] = (9, 13)
) -> int:
    """Preempt it at each look at the memory, another one each time; how many those are."""
    await forget(engine)
    pool = Moments(lambda look: False)
    give(engine, pool)
    expected = await ask(engine)
    await settled()
    assert not expected.timings.preempted
    looks = pool.looks
    assert looks >= 5
    for at in range(2, looks + 1, every):  # the first one lets it in
        await forget(engine)
        before = engine.stats()
        give(engine, Moments(lambda look, at=at: look == at))
        result = await ask(engine)
        await settled()
        check_same(result, expected)
        assert engine.stats().preemptions == before.preemptions + 1, at
        assert result.timings.preempted > 0
        assert "preempted once" in " ".join(result.notes)
        assert engine.stats().running == engine.stats().batch_size == engine.stats().kv_bytes == 0
        assert engine.stats().prompt_tokens - before.prompt_tokens == result.usage.prompt_tokens
    for period in periods:  # long enough to come back to where it was
        await forget(engine)
        give(engine, Moments(lambda look, period=period: look % period == 0))
        result = await ask(engine)
        check_same(result, expected)
    return looks


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "dropped"])
@pytest.mark.parametrize("name", ASKS)
async def test_the_answer_is_the_same_wherever_it_was_preempted(
    tiny_path: Path, name: str, stored: bool
) -> None:
    kept = None if stored else 0
    async with BatchedEngine(tiny_path, prefill_step_size=32, prompt_cache_bytes=kept) as engine:
        await sweep(engine, ASKS[name])


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "dropped"])
async def test_a_logits_processor_is_called_once_for_each_token_and_sees_all_before_it(
    tiny_path: Path, stored: bool
) -> None:
    calls: list[list[list[int]]] = []

    async def ask(engine: BatchedEngine) -> GenerationResult:
        seen: list[list[int]] = []

        def processor(tokens: mx.array, logits: mx.array) -> mx.array:
            seen.append(tokens.tolist())  # type: ignore[arg-type]
            return logits + mx.arange(logits.shape[-1]) % (1 + len(seen))

        result = await engine.generate(PROMPT, **FREE, logits_processors=[processor])
        assert [each[-1] for each in seen[1:]] == list(result.tokens[:-1])
        calls.append(seen)
        return result

    kept = None if stored else 0
    async with BatchedEngine(tiny_path, prefill_step_size=32, prompt_cache_bytes=kept) as engine:
        await sweep(engine, ask)
    assert all(seen == calls[0] for seen in calls)
    assert len(calls) > 14


async def test_stop_strings_are_found_across_a_pause(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, prefill_step_size=32) as engine:
        whole = await engine.generate(PROMPT, **FREE)
        words = [whole.text[at : at + 3] for at in range(2, 9)]
        stop = next(word for word in words if whole.text.count(word) == 1 and word.isprintable())

        async def ask(engine: BatchedEngine) -> GenerationResult:
            result = await engine.generate(PROMPT, **FREE, stop=stop)
            assert result.stop_string == stop
            assert whole.text.startswith(result.text)
            return result

        await sweep(engine, ask)


@pytest.mark.parametrize("strategy", ["draft", "sparse", "both", "self"])
async def test_strategies_go_on_where_they_were(tiny_path: Path, strategy: str) -> None:
    strategies: dict[str, Any] = {}
    if strategy in ("draft", "both"):
        strategies["decode"] = DraftModel(tiny_path, 2)
    if strategy != "draft":
        draft = None if strategy == "self" else tiny_path
        strategies["prefill"] = SpecPrefill(draft, keep=0.3, threshold=64, report_ranges=True)
    ask = lambda engine: engine.generate(LONG, **FREE)  # noqa: E731
    async with BatchedEngine(tiny_path, prefill_step_size=64, **strategies) as engine:
        await sweep(engine, ask, periods=(37,))
        await forget(engine)
        expected = await engine.generate(LONG, **FREE)
        if strategy == "draft":
            assert expected.timings.accepted_tokens > 0
        else:
            assert expected.usage.kept_tokens is not None
            assert expected.usage.kept_tokens < len(LONG)
    async with SimpleEngine(tiny_path, prefill_step_size=64, **strategies) as simple:
        assert (await simple.generate(LONG, **FREE)).tokens == expected.tokens


async def test_a_sparse_prompt_with_a_stored_beginning_keeps_its_ranges(tiny_path: Path) -> None:
    strategy = SpecPrefill(tiny_path, keep=0.3, threshold=64, report_ranges=True)

    async def ask(engine: BatchedEngine) -> GenerationResult:
        await engine.generate(LONG[:100], prefill=None, max_tokens=0)
        result = await engine.generate(LONG, **FREE)
        assert result.usage.kept_ranges is not None
        assert result.usage.kept_ranges[0][1] >= 99
        return result

    async with BatchedEngine(tiny_path, prefill_step_size=64, prefill=strategy) as engine:
        expected = await ask(engine)
        for period in (25, 31, 40):
            await forget(engine)
            give(engine, Moments(lambda look, period=period: look > 9 and look % period == 0))
            check_same(await ask(engine), expected)


@pytest.mark.parametrize("kind", [MIMO, QWEN_NEXT], ids=str)
async def test_a_model_that_drafts_for_itself_goes_on(tmp_path: Path, kind: Any) -> None:
    folder = await made(kind, tmp_path / "model", 3)
    ask = lambda engine: engine.generate(PROMPT, **FREE)  # noqa: E731
    async with BatchedEngine(folder, prefill_step_size=32, decode=MTP(2)) as engine:
        await sweep(engine, ask, every=2)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "dropped"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_families_whose_caches_cannot_be_cut_back_go_on(
    tmp_path: Path, family: str, stored: bool
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES[family]))
    ask = lambda engine: engine.generate(PROMPT, **FREE, logprobs=2)  # noqa: E731
    kept = None if stored else 0
    async with BatchedEngine(folder, prefill_step_size=32, prompt_cache_bytes=kept) as engine:
        await sweep(engine, ask)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "dropped"])
@pytest.mark.parametrize("family", [None, *FAMILIES])
async def test_those_beside_one_that_is_preempted_do_not_notice(
    tmp_path: Path, tiny_path: Path, family: str | None, stored: bool
) -> None:
    folder = tiny_path
    if family is not None:
        folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES[family]))
    draw = random.Random(2)
    work: list[tuple[list[int], dict[str, Any]]] = [
        ([draw.randrange(1, 250) for _ in range(length)], {"max_tokens": count, **each})
        for length, count, each in (
            (9, 40, {}),
            (60, 30, {"temperature": 0.8, "seed": 4}),
            (20, 25, {"logprobs": 2}),
            (45, 35, {"temperature": 1.0, "seed": 9, "repetition_penalty": 1.2}),
        )
    ]
    async with SimpleEngine(folder, prompt_cache_bytes=0) as simple:
        expected = [await simple.generate(p, ignore_eos=True, **o) for p, o in work]
    kept = None if stored else 0
    async with BatchedEngine(folder, prefill_step_size=32, prompt_cache_bytes=kept) as engine:
        before = engine.stats().preemptions
        for moments in [{at} for at in range(3, 60, 4)] + [set(range(5, 400, n)) for n in (6, 9)]:
            await forget(engine)
            give(engine, Moments(moments.__contains__))
            results = await asyncio.gather(
                *(engine.generate(p, ignore_eos=True, **o) for p, o in work)
            )
            await settled()
            for result, wanted in zip(results, expected, strict=True):
                check_same(result, wanted)
            stats = engine.stats()
            assert stats.running == stats.batch_size == stats.kv_bytes == 0
        assert engine.stats().preemptions > before + 5  # not those moments at which one is let in
