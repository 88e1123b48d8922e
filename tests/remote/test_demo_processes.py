"""The demo model in processes of its own: real weights, real loads, a real kill."""

from __future__ import annotations

import asyncio

import pytest

from mlx_engine import EngineDead, ProcessEngine
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.demo]

PROMPT = "The capital of France is"


async def read(engine: ProcessEngine, count: int) -> tuple[int, ...]:
    stream = engine.stream_generate(PROMPT, max_tokens=count, ignore_eos=True)
    async with stream:
        tokens = [token async for chunk in stream for token in chunk.tokens]
    return tuple(tokens)


async def test_the_load_and_the_kill_of_one_do_not_disturb_the_other() -> None:
    async with ProcessEngine("demo", engine="batched") as living:
        answer = await living.generate(PROMPT, max_tokens=24, ignore_eos=True)
        assert "Paris" in answer.text
        dying = ProcessEngine("demo", on_progress=lambda progress: loading.set())

        loading = asyncio.Event()
        reading = asyncio.create_task(read(living, 24))
        start = asyncio.create_task(dying.start())
        await loading.wait()
        dying.kill()
        with pytest.raises(EngineDead, match="SIGKILL"):
            await start
        assert await reading == answer.tokens

        async with dying:
            reading = asyncio.create_task(read(living, 24))
            asked = asyncio.create_task(dying.generate(PROMPT, max_tokens=100))
            await until(lambda: dying.stats().prompt_tokens)
            dying.kill()
            with pytest.raises(EngineDead, match="SIGKILL"):
                await asked
            assert await reading == answer.tokens
