"""How long streams stand still while a large prompt cache is saved; see ``memory.py``."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.joining import Plan, Running
from mlx_engine import BatchedEngine

STREAMS = 4
WAYS = ("nothing", "save", "load")


@dataclass(frozen=True, slots=True)
class Beside:
    """What streams have seen while it was saved or loaded, in seconds.

    Attributes:
        step: the median gap of the streams before.
        gap: the longest while it lasted.
        seconds: that it took.
    """

    step: float
    gap: float
    seconds: float


async def measure_saving(
    folder: str, entries: int, tokens: int, rounds: int
) -> tuple[dict[str, list[Beside]], int]:
    """By way, one a round; and the bytes of one stored prompt."""
    found: dict[str, list[Beside]] = {way: [] for way in WAYS}
    plan = Plan(STREAMS, 0, 0)
    async with BatchedEngine(folder, prompt_cache_bytes=2**40) as engine:
        size = await engine.run_blocking(_fill, engine, entries, tokens)
        with tempfile.TemporaryDirectory() as parent:
            path = Path(parent, "prompts")

            async def work(way: str) -> float:
                start = time.perf_counter()
                if way == "save":
                    await engine.save_prompt_cache(path)
                elif way == "load":
                    await engine.load_prompt_cache(path)
                else:
                    await running.steps(100)
                return time.perf_counter() - start

            for turn in range(rounds + 1):
                for way in WAYS:
                    if way == "load":
                        await engine.run_blocking(_clear, engine)
                    async with Running(engine, plan) as running:
                        gap, before, seconds = await running.beside(work(way))
                    if turn:  # the first is to warm up
                        found[way].append(Beside(statistics.median(before), gap, seconds))
                os.sync()
    return found, size


def _fill(engine: BatchedEngine, entries: int, tokens: int) -> int:
    """Store prompts that nobody has asked for. On the MLX thread."""
    runner = engine._holder.runner()
    chooser, size = random.Random(0), 0
    for _ in range(entries):
        cache: Any = make_prompt_cache(runner.loaded.model)
        heads, dimension = (
            runner.loaded.config["num_key_value_heads"],
            runner.loaded.config["head_dim"],
        )
        for layer in cache:
            shape = (1, heads, tokens, dimension)
            layer.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
        ids = [chooser.randrange(64, 154) for _ in range(tokens)]
        if not runner.prompt_cache.store(ids, cache):
            raise SystemExit("the prompt cache does not take what is to be saved")
        size = runner.prompt_cache.nbytes // len(runner.prompt_cache)
    return size


def _clear(engine: BatchedEngine) -> None:
    """On the MLX thread."""
    engine._holder.runner().prompt_cache.clear()
