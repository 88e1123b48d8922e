"""Answers without tokens: the prompt goes into the prompt cache, and that is all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    ContextLengthExceeded,
    DraftModel,
    GenerationResult,
    ProcessEngine,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.testing import FakeEngine
from tests.conftest import make_tiny
from tests.engine.test_families import FAMILIES
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import QWEN_NEXT

pytestmark = pytest.mark.anyio

PROMPT = list(range(1, 200))


def assert_empty(result: GenerationResult, prompt_tokens: int) -> None:
    assert (result.text, result.reasoning, result.tokens, result.logprobs) == ("", "", (), ())
    assert (result.tool_calls, result.finish_reason) == ((), "length")
    assert result.usage.prompt_tokens == prompt_tokens
    assert result.usage.completion_tokens == 0
    assert result.timings.prefill > 0
    assert result.timings.decode == result.timings.tokens_per_second == 0


async def test_a_prompt_without_an_answer_is_in_the_prompt_cache(engine: BaseEngine) -> None:
    expected = await engine.generate(PROMPT, max_tokens=8, prefill=None)
    for options in ({}, {"logprobs": 3}, {"temperature": 1, "seed": 3}, {"stop": "a"}):
        other = [7, *PROMPT[: 100 + len(options)], len(str(options))]
        told: list[tuple[int, int | None]] = []
        result = await engine.generate(
            other,
            max_tokens=0,
            on_progress=lambda p, told=told: told.append((p.done, p.total)),
            **options,
        )
        await asyncio.sleep(0)
        assert_empty(result, len(other))
        assert told[-1] == (len(other), len(other))
        again = await engine.generate([*other, 5], max_tokens=2, ignore_eos=True)
        assert again.usage.cached_tokens == len(other) - 1
    assert (await engine.generate(PROMPT, max_tokens=8)).tokens == expected.tokens
    assert engine.stats().running == engine.stats().waiting == 0


async def test_a_stream_without_tokens_has_one_chunk_that_ends_it(engine: BaseEngine) -> None:
    async with engine.stream_generate(PROMPT, max_tokens=0, logprobs=1) as stream:
        chunks = [chunk async for chunk in stream]
    (chunk,) = chunks
    assert (chunk.text, chunk.tokens, chunk.logprobs, chunk.finish_reason) == ("", (), (), "length")
    assert_empty(stream.result, len(PROMPT))


async def test_a_chat_without_an_answer_warms_the_cache_for_the_next(engine: BaseEngine) -> None:
    system = {"role": "system", "content": "You are a careful assistant. " * 20}
    messages = [system, {"role": "user", "content": "hi"}]
    warm = await engine.chat(messages, max_tokens=0)
    assert_empty(warm, warm.usage.prompt_tokens)
    result = await engine.chat(messages, max_tokens=2)
    assert result.usage.cached_tokens == warm.usage.prompt_tokens - 1


async def test_a_prompt_of_one_token_without_an_answer_needs_no_prefill(
    engine: BaseEngine,
) -> None:
    result = await engine.generate([5], max_tokens=0)
    assert (result.tokens, result.finish_reason, result.usage.prompt_tokens) == ((), "length", 1)
    assert (await engine.generate([5], max_tokens=1, ignore_eos=True)).tokens


async def test_a_prompt_that_fills_the_context_has_room_for_no_answer(
    engine_type: type[SimpleEngine], tiny_path: Path
) -> None:
    async with engine_type(tiny_path, context_length=len(PROMPT)) as engine:
        assert_empty(await engine.generate(PROMPT, max_tokens=0), len(PROMPT))
        for options in ({"max_tokens": 1}, {"max_tokens": None}):
            with pytest.raises(ContextLengthExceeded):
                await engine.generate(PROMPT, **options)  # type: ignore[arg-type]
        with pytest.raises(ContextLengthExceeded):
            await engine.generate([*PROMPT, 1], max_tokens=0)


async def test_memory_for_a_prompt_alone_is_enough_without_an_answer(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path) as engine:
        await engine.generate(PROMPT, max_tokens=1)
        footprint = engine._holder.budget._footprint
    limit = footprint.nbytes(len(PROMPT))
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=limit) as engine:
        assert_empty(await engine.generate(PROMPT, max_tokens=0), len(PROMPT))
        with pytest.raises(ValueError, match="KV cache"):
            await engine.generate(PROMPT, max_tokens=footprint.tokens(limit))


@pytest.mark.parametrize("strategy", ["draft", "specprefill", "both"])
async def test_strategies_have_nothing_to_do_without_an_answer(
    engine_type: type[SimpleEngine], tiny_path: Path, strategy: str
) -> None:
    options: dict[str, Any] = {}
    if strategy != "specprefill":
        options["decode"] = DraftModel(tiny_path, 2)
    if strategy != "draft":
        options["prefill"] = SpecPrefill(tiny_path, keep=0.5, threshold=64)
    async with engine_type(tiny_path, **options) as engine:
        result = await engine.generate(PROMPT, max_tokens=0)
        assert_empty(result, len(PROMPT))
        assert result.timings.draft_tokens == 0
        again = await engine.generate(PROMPT, max_tokens=4, ignore_eos=True)
        assert len(again.tokens) == 4
        if strategy == "draft":
            assert again.usage.cached_tokens == len(PROMPT) - 1
        else:  # a cache that lacks tokens of its prompt is not kept
            assert result.usage.kept_tokens is not None
            assert again.usage.cached_tokens == 0


async def test_in_a_batch_some_want_no_tokens_and_others_get_theirs(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, max_batch_size=4) as engine:
        prompts = [[i, *PROMPT[:20]] for i in range(1, 13)]
        expected = [
            (await engine.generate(p, max_tokens=6, ignore_eos=True)).tokens for p in prompts
        ]
    async with BatchedEngine(tiny_path, max_batch_size=4) as engine:
        limits = [0 if i % 3 == 0 else 6 for i in range(12)]
        results = await asyncio.gather(
            *(
                engine.generate(p, max_tokens=limit, ignore_eos=True)
                for p, limit in zip(prompts, limits, strict=True)
            )
        )
        for limit, result, tokens in zip(limits, results, expected, strict=True):
            assert result.tokens == tokens[:limit]
            assert result.finish_reason == "length"
        assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("family", ["sliding windows", "recurrent", "hybrid"])
async def test_caches_that_cannot_be_cut_back_are_warmed_too(
    engine_type: type[SimpleEngine], tmp_path: Path, family: str
) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES[family]))
    async with engine_type(folder) as engine:
        expected = await engine.generate(PROMPT, max_tokens=4, ignore_eos=True)
        assert_empty(await engine.generate([9, *PROMPT], max_tokens=0), len(PROMPT) + 1)
        again = await engine.generate([9, *PROMPT], max_tokens=4, ignore_eos=True)
        assert again.usage.cached_tokens == len(PROMPT)
        assert (await engine.generate(PROMPT, max_tokens=4, ignore_eos=True)).tokens == (
            expected.tokens
        )


async def test_a_model_that_drafts_for_itself_is_warmed_too(
    engine_type: type[SimpleEngine], tmp_path: Path
) -> None:
    folder = await made(QWEN_NEXT, tmp_path / "model", 3)
    async with engine_type(folder, decode=MTP(2)) as engine:
        assert_empty(await engine.generate(PROMPT, max_tokens=0), len(PROMPT))
        warm = await engine.generate(PROMPT, max_tokens=6, ignore_eos=True)
        assert warm.usage.cached_tokens == len(PROMPT) - 1
    async with engine_type(folder) as engine:
        plain = await engine.generate(PROMPT, max_tokens=6, ignore_eos=True)
    assert warm.tokens == plain.tokens


@pytest.mark.parametrize("top_p", [0, 0.0])
async def test_a_nucleus_of_nothing_gives_the_greedy_tokens(
    engine: BaseEngine, top_p: float
) -> None:
    greedy = await engine.generate(PROMPT, max_tokens=12, ignore_eos=True)
    for options in ({}, {"seed": 4}, {"xtc_probability": 1.0, "xtc_threshold": 0.0}):
        sampled = await engine.generate(
            PROMPT, max_tokens=12, ignore_eos=True, temperature=1.5, top_p=top_p, **options
        )
        assert sampled.tokens == greedy.tokens


@pytest.mark.parametrize("batch", [None, 2])
async def test_a_fake_engine_gives_no_tokens_either(batch: int | None) -> None:
    async with FakeEngine("Hello there", max_batch_size=batch, context_length=3) as engine:
        result = await engine.generate("a b c", max_tokens=0)
        assert (result.text, result.tokens, result.finish_reason) == ("", (), "length")
        assert result.usage.completion_tokens == 0
        assert (await engine.generate("a b c", max_tokens=0)).usage.cached_tokens == 2
        async with engine.stream_generate("a b", max_tokens=0) as stream:
            assert [chunk.finish_reason async for chunk in stream] == ["length"]


async def test_an_engine_elsewhere_warms_its_cache(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        assert_empty(await engine.generate(PROMPT, max_tokens=0), len(PROMPT))
        again = await engine.generate(PROMPT, max_tokens=1)
        assert again.usage.cached_tokens == len(PROMPT) - 1
