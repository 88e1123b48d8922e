"""Kills at random moments: everybody is told, and the manager serves again, each time.

``MLX_ENGINE_KILLS=100`` makes more of them, ``MLX_ENGINE_SEED`` chooses others.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    EngineDead,
    EngineManager,
    GenerationResult,
    MLXEngineError,
    RestartPolicy,
    SimpleEngine,
)
from tests.conftest import other_tasks
from tests.processes import children
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("MLX_ENGINE_KILLS", "6"))
SEED = int(os.environ.get("MLX_ENGINE_SEED", "0")) or random.SystemRandom().randrange(10**6)
MOMENTS = ("start", "load", "idle", "prefill", "decode", "drain")
PROMPTS: list[Any] = ["short", [7] * 3000, "another one", [9] * 6000]
TOKENS = 40


def pids(manager: EngineManager) -> list[int]:
    """Of all processes that there are now."""
    return [int(line.split()[0]) for line in children()]


async def ask(manager: EngineManager, number: int, streamed: bool) -> GenerationResult:
    prompt = PROMPTS[number % len(PROMPTS)]
    if not streamed:
        return await manager.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
    stream = manager.stream_generate(prompt, max_tokens=TOKENS, ignore_eos=True)
    seen: list[int] = []
    async with stream:
        async for chunk in stream:
            seen += chunk.tokens
    assert tuple(seen) == stream.result.tokens, "chunks of two different answers"
    return stream.result


async def kill_at(moment: str, manager: EngineManager, choose: random.Random) -> None:
    """Wait for the moment, and kill a process."""
    delay = {"prefill": choose.uniform(0, 0.1), "decode": choose.uniform(0.1, 0.5)}
    if moment in ("start", "load"):  # of the replica that comes back from a kill before
        os.kill(choose.choice(pids(manager)), signal.SIGKILL)
        before = set(pids(manager))
        async with asyncio.timeout(PATIENCE):
            while not (new := set(pids(manager)) - before):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0 if moment == "start" else choose.uniform(0.2, 0.9))
        target = new.pop()
    elif moment == "drain":
        leaving = asyncio.create_task(manager.scale(1))
        await asyncio.sleep(choose.uniform(0, 0.2))
        target = choose.choice(pids(manager))
        os.kill(target, signal.SIGKILL)
        await leaving
        await manager.scale(2)
        return
    else:
        await asyncio.sleep(delay.get(moment, 0))
        target = choose.choice(pids(manager))
    try:
        os.kill(target, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was the one that had been killed


@pytest.mark.timeout(300 + 60 * KILLS)
async def test_after_every_kill_everybody_is_told_and_it_serves_again(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"MLX_ENGINE_SEED={SEED}")
    choose = random.Random(SEED)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the processes that are killed too
    monkeypatch.setattr(tempfile, "tempdir", None)
    async with SimpleEngine(tiny_path) as engine:
        expected = [
            (await engine.generate(prompt, max_tokens=TOKENS, ignore_eos=True)).tokens
            for prompt in PROMPTS
        ]
    told: Counter[str] = Counter()
    manager = EngineManager(
        tiny_path,
        replicas=2,
        engine="batched",
        restart=RestartPolicy(max_restarts=10_000, backoff=0.01, max_backoff=0.02),
    )
    async with manager:
        for count in range(KILLS):
            moment = MOMENTS[count % len(MOMENTS)]
            tasks = []
            if moment != "idle":
                tasks = [
                    asyncio.create_task(ask(manager, number, choose.random() < 0.5))
                    for number in range(8)
                ]
                await asyncio.sleep(0)
            await kill_at(moment, manager, choose)
            async with asyncio.timeout(PATIENCE):
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            for number, end in enumerate(ends):
                if isinstance(end, GenerationResult):
                    assert end.tokens == expected[number % len(PROMPTS)]
                else:
                    assert isinstance(end, MLXEngineError), repr(end)
                    assert isinstance(end, EngineDead), repr(end)
                told[type(end).__name__] += 1
            async with asyncio.timeout(PATIENCE):
                assert (await ask(manager, 0, False)).tokens == expected[0]
                while any(info.state != "running" for info in manager.replicas):
                    await asyncio.sleep(0.01)
    print(f"{KILLS} kills: {dict(told)}")
    assert not children()
    gc.collect()
    await until(lambda: not other_tasks(), "tasks are left")
    assert set(os.listdir(tmp_path)) <= {"mlx"}, "MLX keeps its compiled kernels there"
