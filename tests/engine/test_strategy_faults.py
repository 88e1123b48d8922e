"""Faults, memory and pauses with drafts: what helps a request must not harm it, or others."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationError,
    InvalidRequest,
    ModelLoadError,
    Progress,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.generation import prefill
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.generation.cache.snapshot import length
from mlx_engine.generation.speculative.drafter import ModelDrafter
from tests.conftest import make_tiny, settled
from tests.engine.test_families import FAMILIES
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO, QWEN_NEXT

pytestmark = pytest.mark.anyio

DRAW = random.Random(8)
PROMPT = [DRAW.randrange(1, 250) for _ in range(60)]
LONG = [DRAW.randrange(1, 250) for _ in range(900)]
OPTIONS: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What only the cyclic collector frees is not freed in time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def sparse(draft: Path | None, **options: Any) -> SpecPrefill:
    return SpecPrefill(draft, **{"keep": 0.3, "threshold": 100, **options})


# ── faults ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["catch_up", "propose", "verified"])
async def test_a_draft_that_fails_costs_no_answer(
    tiny_path: Path,
    engine_type: type[BaseEngine],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    original, calls = getattr(ModelDrafter, method), 0

    def failing(self: ModelDrafter, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 4 == 3:
            raise MemoryError("no room")
        return original(self, *args)

    async with engine_type(tiny_path, decode=DraftModel(tiny_path, 2)) as engine:
        expected = await engine.generate(PROMPT, decode=None, **OPTIONS)
        monkeypatch.setattr(ModelDrafter, method, failing)
        for _ in range(5):
            result = await engine.generate(PROMPT, **OPTIONS)
            assert result.tokens == expected.tokens
            assert "the draft failed (MemoryError: no room)" in " ".join(result.notes)
        assert engine.stats().failed == 0


async def test_a_request_that_cannot_be_taken_up_fails_by_itself(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ModelDrafter.begin, 0

    def failing(self: ModelDrafter, tokens: list[int], cached: int) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):  # within the group of another one, then on its own turn
            raise MemoryError("no room")
        original(self, tokens, cached)

    async with BatchedEngine(
        tiny_path, decode=DraftModel(tiny_path, 2), prompt_cache_bytes=0
    ) as engine:
        expected = await engine.generate(PROMPT, decode=None, **OPTIONS)
        other = await engine.generate(PROMPT[::-1], decode=None, **OPTIONS)
        monkeypatch.setattr(ModelDrafter, "begin", failing)
        first, second = await asyncio.gather(
            engine.generate(PROMPT, **OPTIONS),
            engine.generate(PROMPT[::-1], **OPTIONS),
            return_exceptions=True,
        )
        assert not isinstance(first, BaseException)
        assert first.tokens == expected.tokens
        assert isinstance(second, GenerationError)
        again = await engine.generate(PROMPT[::-1], **OPTIONS)
        assert again.tokens == other.tokens


async def test_a_fault_while_one_makes_way_for_others_costs_them_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation.speculative.decoder import SpeculativeDecoder

    def failing(self: SpeculativeDecoder) -> None:
        raise MemoryError("no room")

    folder = await made(QWEN_NEXT, tmp_path / "model", 3)
    async with BatchedEngine(folder, decode=MTP(2)) as engine:
        expected = await engine.generate(PROMPT[::-1], decode=None, **OPTIONS)
        async with engine.stream_generate(PROMPT, max_tokens=500, ignore_eos=True) as stream:
            await anext(stream)
            with monkeypatch.context() as patch:
                patch.setattr(SpeculativeDecoder, "settle", failing)
                beside = await engine.generate(PROMPT[::-1], **OPTIONS)
            assert beside.tokens == expected.tokens
            with pytest.raises(GenerationError, match="no room"):
                async for _ in stream:
                    pass


async def test_sparse_and_dense_prompts_that_come_together_do_not_mix(tiny_path: Path) -> None:
    prompts = [LONG[:60], LONG[:250], LONG[300:330], LONG[100:420]]
    prefill = sparse(tiny_path)
    async with SimpleEngine(tiny_path, prefill=prefill, prompt_cache_bytes=0) as plain:
        expected = [(await plain.generate(p, **OPTIONS)).tokens for p in prompts]
    async with BatchedEngine(tiny_path, prefill=prefill, prompt_cache_bytes=0) as engine:
        for _ in range(3):
            results = await asyncio.gather(*(engine.generate(p, **OPTIONS) for p in prompts))
            assert [r.tokens for r in results] == expected


# ── other drafts than the model would like ──────────────────────────────────────────────────


async def test_a_draft_with_a_smaller_matrix_reads_what_it_can(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    narrow = make_tiny(tmp_path / "draft", "3", "--other", json.dumps({"vocab_size": 100}))
    async with engine_type(
        tiny_path, decode=DraftModel(narrow, 2), prefill=sparse(narrow)
    ) as engine:
        for prompt in (PROMPT, LONG):
            expected = await engine.generate(prompt, decode=None, **OPTIONS)
            result = await engine.generate(prompt, **OPTIONS)
            assert result.tokens == expected.tokens
            assert result.timings.draft_tokens > 0


async def test_a_draft_with_a_shorter_context_reads_no_further(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine]
) -> None:
    other = json.dumps({"max_position_embeddings": 128})
    short = make_tiny(tmp_path / "draft", "0", "--other", other)
    async with engine_type(tiny_path, decode=DraftModel(short, 2), prefill=sparse(short)) as engine:
        long = await engine.generate(LONG, **OPTIONS)
        assert long.timings.draft_tokens == 0
        assert "the draft would have to read" in " ".join(long.notes)
        grown = await engine.generate(PROMPT, max_tokens=150, ignore_eos=True)
        assert 0 < grown.timings.draft_tokens < 80
        assert "a context of 128 tokens only" in " ".join(grown.notes)
        expected = await engine.generate(PROMPT, max_tokens=150, ignore_eos=True, decode=None)
        assert grown.tokens == expected.tokens


async def test_what_a_recurrent_draft_keeps_is_what_it_says(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(FAMILIES["recurrent"]))
    async with SimpleEngine(folder, decode=DraftModel(folder, 4)) as engine:
        whole = await engine.generate(PROMPT, **OPTIONS)
        for place in range(5, 11):  # the answer ends inside of a burst
            stop = [whole.tokens[place]]
            cut = await engine.generate(PROMPT, stop_token_ids=stop, **OPTIONS)
            follow_up = await engine.generate([*PROMPT, *cut.tokens, 1, 2], **OPTIONS)
            assert follow_up.timings.acceptance_rate == 1


# ── time ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cached", [31, 127, 128, 130])
async def test_a_cached_beginning_does_not_make_the_steps_small(
    tiny_path: Path, engine_type: type[BaseEngine], cached: int
) -> None:
    told: list[Progress] = []
    async with engine_type(tiny_path, prefill=sparse(tiny_path), prefill_step_size=128) as engine:
        await engine.generate(LONG[: cached + 1], prefill=None, max_tokens=1)
        await settled()
        result = await engine.generate(LONG, on_progress=told.append, **OPTIONS)
    assert result.usage.cached_tokens >= cached
    assert result.usage.kept_tokens is not None
    assert len(told) < 35


async def test_the_pace_of_prefill_counts_what_went_through_each_model(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[int, int] = {}

    def noted(self: Any, seconds: float, tokens: int) -> None:
        counted[id(self)] = counted.get(id(self), 0) + tokens

    monkeypatch.setattr(prefill.ChunkSize, "took", noted)
    async with BatchedEngine(tiny_path, prefill=sparse(tiny_path)) as engine:
        result = await engine.generate(LONG, **OPTIONS)
        runner = engine._holder.runner()
        assert result.usage.kept_tokens is not None
        assert counted[id(runner.chunk)] == result.usage.kept_tokens - 1
        assert 850 < counted[id(runner.draft_chunk)] <= len(LONG)


# ── memory ──────────────────────────────────────────────────────────────────────────────────


async def test_requests_leave_nothing_for_the_garbage_collector(
    tiny_path: Path, engine_type: type[BaseEngine], no_gc: None
) -> None:
    async with engine_type(
        tiny_path,
        prefill=sparse(tiny_path),
        decode=DraftModel(tiny_path, 2),
        prompt_cache_bytes=0,
    ) as engine:
        for _ in range(2):
            await engine.generate(LONG, **OPTIONS)
        await settled()
        before = await engine.run_blocking(mx.get_active_memory)
        for n in range(5):
            await engine.generate(LONG[n:], **OPTIONS)
        await settled()
        assert await engine.run_blocking(mx.get_active_memory) <= before + 2**16
    assert mx.get_active_memory() < 2**16


async def test_a_failed_start_holds_no_model(
    tmp_path: Path, tiny_path: Path, engine_type: type[BaseEngine], no_gc: None
) -> None:
    damaged = make_tiny(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    errors: list[Exception] = []
    for options in (
        {"decode": DraftModel(damaged)},
        {"decode": MTP()},
        {"prefill": sparse(damaged)},
    ):
        try:
            await engine_type(tiny_path, **options).start()  # type: ignore[arg-type]
        except (InvalidRequest, ModelLoadError) as error:
            errors.append(error)  # with its traceback
    assert len(errors) == 3
    assert mx.get_active_memory() < 2**16


async def test_the_drafts_prompts_count_as_memory_too(tiny_path: Path) -> None:
    limit = 1_500_000
    async with BatchedEngine(
        tiny_path, decode=DraftModel(tiny_path, 2), kv_cache_memory_bytes=limit
    ) as engine:
        for n in range(20):
            await engine.generate(LONG[20 * n : 20 * n + 200], **OPTIONS)
        await settled()
        runner = engine._holder.runner()
        stored: list[PromptCache] = [
            runner.prompt_cache,
            *(cache for cache, _ in runner.strategies.side_caches),
        ]
        assert 0 < sum(cache.nbytes for cache in stored) <= limit


async def test_a_request_that_fits_without_a_draft_is_not_refused(tiny_path: Path) -> None:
    async with BatchedEngine(
        tiny_path,
        prefill=sparse(None, threshold=300),
        decode=DraftModel(tiny_path, 2),
        kv_cache_memory_bytes=700_000,
    ) as engine:
        small = await engine.generate(PROMPT, **OPTIONS)
        assert small.timings.draft_tokens > 0
        large = await engine.generate(LONG, **OPTIONS)
        assert "no memory for a draft" in " ".join(large.notes)
        assert large.timings.draft_tokens == 0
        expected = await engine.generate(LONG, prefill=None, decode=None, **OPTIONS)
        assert large.tokens == expected.tokens


async def test_a_head_keeps_no_more_states_than_it_may_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation.speculative import mtp

    monkeypatch.setattr(mtp, "_MOST", 32)
    monkeypatch.setattr(mtp, "_CHUNK", 16)
    folder = await made(MIMO, tmp_path / "model")
    async with SimpleEngine(folder, decode=MTP(), prefill_step_size=20) as engine:
        expected = await engine.generate(LONG[:300], decode=None, **OPTIONS)
        speculation = engine._holder.runner().strategies.speculation
        assert speculation is not None
        kept: list[int] = []
        observe = mtp.MTPDrafter.observe

        def noted(self: Any, tokens: list[int], start: int, hidden: mx.array) -> None:
            observe(self, tokens, start, hidden)
            kept.append(sum(states.shape[0] for _, states in self._waiting))

        monkeypatch.setattr(mtp.MTPDrafter, "observe", noted)
        for parked in (True, False):
            monkeypatch.setattr(type(speculation.chooser), "parked", parked)
            result = await engine.generate(LONG[:300], max_tokens=80, ignore_eos=True)
            assert result.tokens[:30] == expected.tokens
        assert max(kept) <= 32 + 16 + 20
        ((side, _),) = engine._holder.runner().strategies.side_caches
        assert all(length(entry.cache) == len(entry.tokens) for entry in side.entries())
