"""Requests without a limit, on memory for a few of them at their longest; see ``memory.py``."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from benchmarks.setting import rotated
from benchmarks.soak_samples import resident_bytes
from mlx_engine import BatchedEngine, GenerationResult
from mlx_engine.generation.cache.kv_cache import KVFootprint

WAYS = ("no limit", "own limit")
LIMIT = 180.0  # seconds for a run; what is not finished then is not
_LOOK = 0.005  # seconds between two looks at the engine


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what it will make.

    Attributes:
        prompt: token ids.
        seed: of its sampling.
        stop: the token that ends it.
        tokens: that it makes.
    """

    prompt: list[int]
    seed: int
    stop: int
    tokens: tuple[int, ...]

    def options(self, limit: int | None) -> dict[str, Any]:
        return {
            "max_tokens": limit,
            "temperature": 1.0,
            "seed": self.seed,
            "stop_token_ids": (self.stop,),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One run of all requests.

    Attributes:
        rate: tokens a second, all of them from the first submission to the last answer.
        finished: requests that came to their end in time.
        pause: seconds, the longest gap in any stream.
        first: seconds until the last of them had its first token.
        rows, most_rows: requests that decoded together, the median look and the most.
        preempted: requests that had to leave the batch.
        peak: bytes, by MLX.
        told: bytes, by the engine.
        grown: bytes by which the process grew.
    """

    rate: float
    finished: int
    pause: float
    first: float
    rows: float
    most_rows: int
    preempted: int
    peak: int
    told: int
    grown: int


Runs = dict[int, dict[str, list[Run]]]  # by budget, and by way


async def plan(engine: BatchedEngine, context: int, rows: int) -> list[Asked]:
    """Requests that end by themselves: a token at which each does is looked for first."""
    chooser = random.Random(0)
    asked = []
    for seed in range(rows):
        prompt = [chooser.randrange(64, 154) for _ in range(chooser.randint(16, 64))]
        options = {"temperature": 1.0, "seed": seed, "ignore_eos": True}
        result = await engine.generate(prompt, max_tokens=context // 3, **options)
        wanted = chooser.randint(context // 8, context // 3 - 1)
        firsts: dict[int, int] = {}
        for place, token in enumerate(result.tokens):
            firsts.setdefault(token, place)
        stop, place = min(firsts.items(), key=lambda item: abs(item[1] - wanted))
        asked.append(Asked(prompt, seed, stop, result.tokens[:place]))
    return asked


class Watch:
    """Looks at an engine again and again while a run lasts."""

    def __init__(self, engine: BatchedEngine) -> None:
        self._engine = engine
        self.rows: list[int] = []
        self.told = self.grown = 0

    async def look(self) -> None:
        before = resident_bytes()
        while True:
            stats = self._engine.stats()
            self.rows.append(stats.batch_size)
            self.told = max(self.told, stats.kv_bytes + stats.prompt_cache.nbytes)
            self.grown = max(self.grown, resident_bytes() - before)
            await asyncio.sleep(_LOOK)


async def read(
    engine: BatchedEngine, asked: Asked, limited: bool
) -> tuple[GenerationResult, list[float]]:
    """One request, and when its tokens came."""
    times = []
    limit = len(asked.tokens) + 1 if limited else None
    options = asked.options(limit)
    async with engine.stream_generate(asked.prompt, **options, ignore_eos=True) as stream:
        async for chunk in stream:
            if chunk.tokens:
                times.append(time.perf_counter())
    return stream.result, times


async def run(engine: BatchedEngine, asked: list[Asked], way: str) -> Run:
    await engine.run_blocking(mx.clear_cache)
    await engine.run_blocking(mx.reset_peak_memory)
    before = await engine.run_blocking(mx.get_active_memory)
    watch = Watch(engine)
    watching = asyncio.create_task(watch.look())
    start = time.perf_counter()
    tasks = [asyncio.create_task(read(engine, one, way == "own limit")) for one in asked]
    done, late = await asyncio.wait(tasks, timeout=LIMIT)
    seconds = time.perf_counter() - start
    for task in (*late, watching):
        task.cancel()
    await asyncio.wait([*late, watching])
    peak = await engine.run_blocking(mx.get_peak_memory)
    told = {task: task.result() for task in done}
    for task, one in zip(tasks, asked, strict=True):
        if task in told:
            check(way, told[task][0], one)
    times = [each for _, each in told.values() if each]
    gaps = [later - earlier for each in times for earlier, later in pairwise(each)]
    decoding = [rows for rows in watch.rows if rows]
    return Run(
        rate=sum(len(result.tokens) for result, _ in told.values()) / seconds,
        finished=len(told),
        pause=max(gaps, default=0.0),
        first=max((each[0] - start for each in times), default=seconds),
        rows=statistics.median(decoding or [0]),
        most_rows=max(watch.rows, default=0),
        preempted=sum(was_preempted(result) for result, _ in told.values()),
        peak=peak - before,
        told=watch.told,
        grown=watch.grown,
    )


def was_preempted(result: GenerationResult) -> bool:
    """Whether it had to leave the batch for a while."""
    return bool(getattr(result.timings, "preempted", 0))


def check(way: str, result: GenerationResult, asked: Asked) -> None:
    """The same tokens as with room for everything, or the end."""
    got = [token for token in result.tokens if token != asked.stop]
    if got != list(asked.tokens) or result.finish_reason != "stop":
        raise SystemExit(
            f"{way}: the request with seed {asked.seed} gave other tokens ({len(got)}, "
            f"{result.finish_reason}) than with room for everything ({len(asked.tokens)})"
        )


async def measure_unlimited(
    folder: str, context: int, rows: int, budgets: Sequence[int], rounds: int
) -> tuple[Runs, int]:
    """All runs, and the bytes of the KV cache of a whole context."""
    size: KVFootprint | None = None
    async with BatchedEngine(folder, context_length=context, prompt_cache_bytes=0) as engine:
        asked = await plan(engine, context, rows)
        size = await engine.run_blocking(lambda: engine._holder.runner().footprint)
    full = size.nbytes(context)
    runs: Runs = {budget: {way: [] for way in WAYS} for budget in budgets}
    for budget in budgets:
        async with BatchedEngine(
            folder,
            context_length=context,
            max_batch_size=rows,
            kv_cache_memory_bytes=budget * full,
        ) as engine:
            await run(engine, asked[:4], "own limit")  # warm-up
            for turn in range(rounds):
                for way in rotated(list(WAYS), turn):
                    await engine.run_blocking(forget, engine)
                    runs[budget][way].append(await run(engine, asked, way))
    return runs, full


def forget(engine: BatchedEngine) -> None:
    """On the MLX thread: no prompt is stored."""
    engine._holder.runner().prompt_cache.clear()
