"""Prompts that begin alike: those that come together prefill it once, and warm() does it before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    GenerationResult,
    InvalidRequest,
    ProcessEngine,
    SimpleEngine,
)
from mlx_engine.testing import FakeEngine
from tests.generation.rigged import made
from tests.guard import Gate
from tests.models.mtp_checkpoints import DENSE_QWEN

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
PREFIX = [1 + 7 * n % 250 for n in range(500)]
ENDINGS = [[1 + (11 * n + 3 * i) % 250 for n in range(10 + 4 * i)] for i in range(8)]
PROMPTS = [[*PREFIX, 200 + i, *ending] for i, ending in enumerate(ENDINGS)]
SUFFIXES = sum(len(prompt) - len(PREFIX) for prompt in PROMPTS)
OPTIONS: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cache cannot be cut back."""
    return asyncio.run(made(DENSE_QWEN, tmp_path_factory.mktemp("hybrid")))


async def prefilled(engine: BaseEngine, work: Awaitable[Any]) -> tuple[int, Any]:
    """How many tokens of prompts were prefilled, and what came out."""
    before = engine.stats()
    results = await work
    after = engine.stats()
    read = after.prompt_tokens - before.prompt_tokens
    return read - (after.cached_tokens - before.cached_tokens), results


def at_once(engine: BaseEngine, prompts: list[list[int]]) -> Awaitable[Any]:
    return asyncio.gather(*(engine.generate(prompt, **OPTIONS) for prompt in prompts))


@pytest.mark.parametrize("step", [128, 512, 2048, 8192])
async def test_eight_that_come_at_once_prefill_their_beginning_once(
    tiny_path: Path, step: int
) -> None:
    async with BatchedEngine(tiny_path, prompt_cache_bytes=0) as alone:
        expected = [(await alone.generate(prompt, **OPTIONS)).tokens for prompt in PROMPTS]
    async with BatchedEngine(tiny_path, prefill_step_size=step) as engine:
        count, results = await prefilled(engine, at_once(engine, PROMPTS))
        assert count <= len(PREFIX) + SUFFIXES + 8
        assert sorted(r.usage.cached_tokens for r in results)[1:] == [len(PREFIX)] * 7
        assert [r.tokens for r in results] == expected


async def test_so_do_those_that_come_while_the_first_one_is_read(
    tiny_path: Path, gate: MakeGate
) -> None:
    async with BatchedEngine(tiny_path, prefill_step_size=64) as engine:
        stop = gate("model", 2)
        first = asyncio.create_task(engine.generate(PROMPTS[0], **OPTIONS))
        await stop.reached()
        rest = asyncio.ensure_future(at_once(engine, PROMPTS[1:]))
        await asyncio.sleep(0.05)
        stop.go()
        count, _ = await prefilled(engine, asyncio.gather(first, rest))
        total = engine.stats().prompt_tokens - engine.stats().cached_tokens
        assert total <= len(PREFIX) + SUFFIXES + 8
        assert count <= total


async def test_where_a_cache_cannot_be_cut_back_too(hybrid: Path) -> None:
    async with BatchedEngine(hybrid, prompt_cache_bytes=0) as alone:
        expected = [(await alone.generate(prompt, **OPTIONS)).tokens for prompt in PROMPTS]
    async with BatchedEngine(hybrid) as engine:
        count, results = await prefilled(engine, at_once(engine, PROMPTS))
        assert count <= len(PREFIX) + SUFFIXES + 8
        assert [r.tokens for r in results] == expected


async def test_if_the_one_ahead_is_cancelled_another_goes_on(
    tiny_path: Path, gate: MakeGate
) -> None:
    async with BatchedEngine(tiny_path, prefill_step_size=64) as engine:
        stop = gate("model", 2)
        tasks = [asyncio.create_task(engine.generate(p, **OPTIONS)) for p in PROMPTS[:3]]
        await stop.reached()
        tasks[0].cancel()
        await asyncio.sleep(0)
        stop.go()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ends[0], asyncio.CancelledError)
        cached = []
        for end in ends[1:]:
            assert isinstance(end, GenerationResult)
            assert len(end.tokens) == 3
            cached.append(end.usage.cached_tokens)
        assert max(cached) == len(PREFIX)
        assert 0 < min(cached) < len(PREFIX)  # what the one that was cancelled had done


async def test_nobody_waits_where_no_prompts_are_kept(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, prompt_cache_bytes=0) as engine:
        count, _ = await prefilled(engine, at_once(engine, PROMPTS))
        assert count == sum(map(len, PROMPTS))


async def test_the_same_prompt_eight_times(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path) as engine:
        count, results = await prefilled(engine, at_once(engine, [PREFIX] * 8))
        assert count <= len(PREFIX) + 16
        assert len({r.tokens for r in results}) == 1


# warm()


async def test_a_warm_prompt_is_not_prefilled_again(engine: BaseEngine) -> None:
    usage = await engine.warm(PREFIX)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (500, 0, 0)
    result = await engine.generate(PROMPTS[0], **OPTIONS)
    assert result.usage.cached_tokens >= 499
    assert (await engine.warm(PREFIX)).cached_tokens == 499


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine])
@pytest.mark.parametrize("model", ["tiny", "hybrid"])
async def test_the_beginning_of_conversations(
    kind: Any, model: str, tiny_path: Path, hybrid: Path
) -> None:
    system = {"role": "system", "content": "Be brief, and say what is true. " * 4}
    async with kind(tiny_path if model == "tiny" else hybrid) as engine:
        await engine.warm([system])
        rendered = await engine.render_chat([system, {"role": "user", "content": "Hi there"}])
        assert rendered.cached_tokens >= 100
        chat = await engine.chat([system, {"role": "user", "content": "Hi there"}], max_tokens=2)
        assert chat.usage.cached_tokens == rendered.cached_tokens


async def test_it_goes_to_another_process(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        assert (await engine.warm(PREFIX)).prompt_tokens == 500
        assert (await engine.generate(PROMPTS[0], **OPTIONS)).usage.cached_tokens >= 499


async def test_a_fake_says_nothing_to_it() -> None:
    async with FakeEngine(iter(["one"])) as engine:
        await engine.warm([{"role": "system", "content": "Be brief."}])
        assert (await engine.chat([{"role": "user", "content": "Hi"}])).text == "one"


async def test_where_nothing_is_kept_it_is_refused(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as engine:
        with pytest.raises(InvalidRequest, match=r"^prompt_cache_bytes: "):
            await engine.warm("abc")
    with pytest.raises(InvalidRequest, match=r"^tools: is for messages"):
        await FakeEngine().warm("abc", tools=[{"name": "x"}])
    with pytest.raises(InvalidRequest, match=r"^max_tokens: "):
        await FakeEngine().warm("abc", max_tokens=5)  # type: ignore[call-arg]
