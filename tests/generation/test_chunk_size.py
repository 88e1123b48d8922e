"""Prefill chunks: short where the model is slow, so that a cancel is heard, and whole where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BaseEngine, BatchedEngine, Progress, SimpleEngine, SpecPrefill
from mlx_engine.generation import prefill
from mlx_engine.generation.prefill import ChunkSize

PROMPT = [1 + n % 97 for n in range(200)]


def test_a_fast_model_has_whole_chunks_from_the_first_one_on() -> None:
    chunk = ChunkSize(512, fixed=False)
    chunk.expect(1 / 600)
    assert chunk.tokens == 512
    for seconds in (0.9, 0.1, 0.9):
        chunk.took(seconds, 512)
        assert chunk.tokens == 512


def test_a_slow_one_begins_with_short_ones() -> None:
    chunk = ChunkSize(512, fixed=False)
    chunk.expect(1 / 100)
    assert chunk.tokens == 64
    chunk = ChunkSize(512, fixed=False)
    chunk.expect(10.0)
    assert chunk.tokens == 16
    chunk = ChunkSize(20, fixed=False)
    chunk.expect(10.0)
    assert chunk.tokens == 20, "too few to be halved"


def test_it_learns_and_forgets() -> None:
    chunk = ChunkSize(100, fixed=False)
    sizes = []
    for seconds in (2.0, 2.0, 2.0, 0.5, 0.1, 0.1, 0.1):
        chunk.took(seconds, chunk.tokens)
        sizes.append(chunk.tokens)
    assert sizes == [50, 25, 25, 25, 50, 100, 100]
    chunk.took(2.0, 7)  # the end of a prompt, long behind a long one
    assert chunk.tokens == 50
    chunk.took(0.01, 7)
    assert chunk.tokens == 50, "a few tokens say nothing of many"


def test_it_stays_where_answers_depend_on_it() -> None:
    chunk = ChunkSize(512, fixed=True)
    chunk.expect(10.0)
    chunk.took(10.0, 512)
    assert chunk.tokens == 512


def test_one_that_others_wait_for_is_as_long_as_they_may_wait() -> None:
    chunk = ChunkSize(512, fixed=False)
    assert (chunk.within(None), chunk.within(0.05)) == (512, 64), "nothing is known yet"
    chunk.took(0.064, 64)
    assert (chunk.within(None), chunk.within(0.05), chunk.within(0.001)) == (512, 50, 16)
    chunk.took(0.2, 100)
    assert chunk.within(0.05) == 25, "slower at once"
    chunk.took(0.1, 100)
    assert chunk.within(0.05) == 33, "faster by and by"
    chunk.took(9.0, 3)
    assert chunk.within(0.05) == 33, "a few tokens say nothing of many"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each chunk took too long."""
    monkeypatch.setattr(prefill, "_LONGEST", 0.0)


async def ends(engine: BaseEngine) -> list[int]:
    """Where the chunks of a prefill end."""
    told: list[Progress] = []
    await engine.generate(PROMPT, max_tokens=1, on_progress=told.append)
    done = [p.done for p in told if p.phase == "prefill" and p.done]
    assert done.pop() == len(PROMPT), "with the first token, the last of the prompt is in too"
    return done


@pytest.mark.anyio
@pytest.mark.parametrize("make", [SimpleEngine, BatchedEngine])
@pytest.mark.parametrize("options", [{}, {"prefill": SpecPrefill(threshold=1000)}])
@pytest.mark.usefixtures("slow")
async def test_chunks_of_a_slow_model_are_short_and_the_answer_is_the_same(
    make: Any, options: dict[str, Any], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(tiny_path, prefill_step_size=128, prompt_cache_bytes=0, **options) as engine:
        short = await engine.generate(PROMPT, max_tokens=8, ignore_eos=True)
        assert await ends(engine) == [*range(16, 199, 16), 199]
        monkeypatch.setattr(prefill, "_LONGEST", 1e6)
        grown = await ends(engine)
        assert grown[:3] == [16, 48, 112] if make is BatchedEngine else [16, 32, 64]
        whole = await engine.generate(PROMPT, max_tokens=8, ignore_eos=True)
        assert await ends(engine) == [128, 199]
    assert short.tokens == whole.tokens


@pytest.mark.anyio
@pytest.mark.usefixtures("slow")
async def test_they_stay_whole_where_the_answer_depends_on_them(tiny_path: Path) -> None:
    async with SimpleEngine(
        tiny_path, prefill_step_size=128, prompt_cache_bytes=0, max_kv_size=64
    ) as engine:
        assert await ends(engine) == [128, 199]
