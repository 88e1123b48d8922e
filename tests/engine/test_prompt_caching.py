"""The prompt cache as users see it, in both engines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mlx_engine import (
    BaseEngine,
    EngineState,
    GenerationResult,
    InvalidRequest,
    SimpleEngine,
)
from tests.conftest import make_tiny, settled
from tests.guard import Gate

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]


@pytest.fixture
async def cold(tiny_path: Path) -> AsyncIterator[SimpleEngine]:
    async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as engine:
        yield engine


def tokens_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 250) for _ in range(length)]


async def ask(engine: BaseEngine, prompt: list[int], **options: object) -> GenerationResult:
    result = await engine.generate(prompt, max_tokens=12, ignore_eos=True, **options)  # type: ignore[arg-type]
    await settled()  # the answer is stored a moment after it is given
    return result


async def test_a_growing_conversation_prefills_only_what_is_new(
    engine: BaseEngine, cold: SimpleEngine
) -> None:
    prompt = tokens_of(60, 1)
    for turn in range(5):
        result = await ask(engine, prompt)
        assert result.tokens == (await ask(cold, prompt)).tokens
        expected = 0 if turn == 0 else len(prompt) - 30 - 1
        assert result.usage.cached_tokens >= expected
        assert result.usage.prompt_tokens == len(prompt)
        prompt = [*prompt, *result.tokens, *tokens_of(30, turn)]
    cache = engine.stats().prompt_cache
    assert (cache.hits, cache.misses, cache.entries) == (4, 1, 1)


async def test_interleaved_conversations_forks_and_a_shared_beginning(
    engine: BaseEngine, cold: SimpleEngine
) -> None:
    system = tokens_of(100, 9)
    draw = random.Random(3)
    conversations = [[*system, *tokens_of(20, n)] for n in range(3)]
    for _ in range(20):
        n = draw.randrange(len(conversations))
        prompt = conversations[n]
        result = await ask(engine, prompt)
        assert result.tokens == (await ask(cold, prompt)).tokens
        follow_up = [
            *prompt,
            *result.tokens[: draw.randrange(1, 12)],
            *tokens_of(10, draw.randrange(10**6)),
        ]
        if draw.random() < 0.3:
            conversations.append(follow_up)  # a fork: the old one goes on as well
        else:
            conversations[n] = follow_up
    stats = engine.stats()
    assert stats.prompt_cache.misses == 1
    assert stats.cached_tokens == stats.prompt_cache.hit_tokens
    assert stats.cached_tokens > 0.8 * stats.prompt_tokens


async def test_what_a_cancelled_request_has_prefilled_is_used_by_its_retry(
    tiny_path: Path, engine_type: type[BaseEngine], cold: SimpleEngine, gate: MakeGate
) -> None:
    prompt = tokens_of(400, 5)
    async with engine_type(tiny_path, prefill_step_size=32) as engine:
        stop = gate("model", 6)
        task = asyncio.create_task(engine.generate(prompt, max_tokens=12, ignore_eos=True))
        await stop.reached()
        task.cancel()
        stop.go()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled()
        retry = await ask(engine, prompt)
        assert retry.usage.cached_tokens == 6 * 32
        assert retry.tokens == (await ask(cold, prompt)).tokens


async def test_what_a_cancelled_request_has_decoded_is_used_by_its_retry(
    engine: BaseEngine, cold: SimpleEngine
) -> None:
    prompt = tokens_of(100, 6)
    async with engine.stream_generate(prompt, max_tokens=500, ignore_eos=True) as stream:
        async for _ in stream:
            if len(stream._producer.partial_result().tokens) >= 5:
                break
    await settled()
    longer = [*prompt, *stream.result.tokens]
    result = await ask(engine, longer)
    assert result.usage.cached_tokens >= len(longer) - 2
    assert result.tokens == (await ask(cold, longer)).tokens


async def test_a_seeded_answer_is_the_same_with_and_without_it(
    engine: BaseEngine, cold: SimpleEngine
) -> None:
    prompt = tokens_of(80, 7)
    expected = (await ask(cold, prompt, temperature=1.0, seed=5)).tokens
    for _ in range(3):
        assert (await ask(engine, prompt, temperature=1.0, seed=5)).tokens == expected


async def test_a_miss_is_explained(engine: BaseEngine) -> None:
    await ask(engine, tokens_of(80, 1))
    changed = tokens_of(80, 1)
    changed[3] += 1
    result = await ask(engine, changed)
    assert result.usage.cached_tokens == 0
    lookup = engine.stats().prompt_cache.last_lookup
    assert lookup is not None
    assert lookup.request_id == result.request_id
    assert (lookup.diverged_at, lookup.prompt_token) == (3, changed[3])
    assert lookup.stored_token == changed[3] - 1


async def test_it_stays_within_its_bytes_and_drops_what_was_used_least_recently(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    limit = 3 * 300 * 512
    first, second = tokens_of(250, 1), tokens_of(250, 2)
    async with engine_type(tiny_path, prompt_cache_bytes=limit) as engine:
        await ask(engine, first)
        for n in range(10):
            await ask(engine, tokens_of(250, 10 + n))
            hit = await ask(engine, first)
            assert hit.usage.cached_tokens == 249
            assert engine.stats().prompt_cache.nbytes <= limit
        assert engine.stats().prompt_cache.evicted >= 7
        assert (await ask(engine, second)).usage.cached_tokens == 0


async def test_switched_off_it_stores_nothing(
    tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    async with engine_type(tiny_path, prompt_cache_bytes=0) as engine:
        for _ in range(2):
            assert (await ask(engine, tokens_of(80, 1))).usage.cached_tokens == 0
        assert engine.stats().prompt_cache.nbytes == 0


@pytest.mark.parametrize("options", [{"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 64}])
async def test_with_a_quantised_or_bounded_cache_the_tokens_are_those_without_it(
    tiny_path: Path, options: dict[str, int]
) -> None:
    async with (
        SimpleEngine(tiny_path, prefill_step_size=16, prompt_cache_bytes=0, **options) as cold,  # type: ignore[arg-type]
        SimpleEngine(tiny_path, prefill_step_size=16, **options) as engine,  # type: ignore[arg-type]
    ):
        prompt = tokens_of(40, 1)
        for turn in range(4):
            result = await ask(engine, prompt)
            assert result.tokens == (await ask(cold, prompt)).tokens
            prompt = [*prompt, *result.tokens, *tokens_of(9, turn)]
        if "kv_bits" in options:
            assert engine.stats().cached_tokens > 0


async def test_saved_and_loaded_it_serves_another_engine(
    tiny_path: Path, engine_type: type[BaseEngine], engine: BaseEngine, tmp_path: Path
) -> None:
    prompt = tokens_of(200, 1)
    first = await ask(engine, prompt)
    await ask(engine, tokens_of(100, 2))
    assert await engine.save_prompt_cache(tmp_path / "cache") == 2
    async with engine_type(tiny_path) as other:
        assert await other.load_prompt_cache(str(tmp_path / "cache")) == 2
        result = await ask(other, prompt)
        assert result.usage.cached_tokens == 199
        assert result.tokens == first.tokens


async def test_a_file_of_another_model_or_no_file_is_refused_and_nothing_changes(
    engine: BaseEngine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path / "cache"
    await ask(engine, tokens_of(50, 1))
    await engine.save_prompt_cache(path)
    async with SimpleEngine(make_tiny(tmp_path / "other", "5")) as other:
        with pytest.raises(InvalidRequest, match="another model"):
            await other.load_prompt_cache(path)
        assert other.stats().prompt_cache.entries == 0
    for wrong in (tmp_path / "nothing", tmp_path, "", 5):
        with pytest.raises(InvalidRequest, match="path"):
            await engine.load_prompt_cache(wrong)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidRequest, match="path"):
        await engine.load_prompt_cache(path)
    assert engine.stats().prompt_cache.entries == 1
    with pytest.raises(InvalidRequest, match="path"):
        await engine.save_prompt_cache(tmp_path / "no" / "folder")
    assert (await ask(engine, tokens_of(50, 1))).usage.cached_tokens == 49


async def test_a_prompt_that_cannot_be_stored_is_answered_all_the_same(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation.cache.prompt_cache import PromptCache

    def broken(*args: object, **kwargs: object) -> bool:
        raise RuntimeError("no memory left")

    expected = (await ask(engine, tokens_of(100, 1))).tokens
    monkeypatch.setattr(PromptCache, "store", broken)
    for _ in range(2):
        assert (await ask(engine, tokens_of(100, 1))).tokens == expected
    assert engine.state is EngineState.RUNNING
    assert engine.stats().failed == 0
