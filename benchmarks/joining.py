"""A long prompt that joins a running batch: the engine's, and mlx_lm's.

What is measured, and against what, is said in ``benchmarks.join_stall``.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine import BatchedEngine

T = TypeVar("T")

SLICE = 512
BEFORE = 60  # steps before the join, of which the plain step is taken
AFTER = 5  # tokens of the long prompt, so that its first one is no special case


@dataclass(frozen=True, slots=True)
class Join:
    """One join, in seconds.

    Attributes:
        step: median gap of the running streams before it.
        gap: the longest one while it lasted.
        where: when that gap was over, as a share of the join: over 1, the gap held the first token.
        thread_gap: the longest one by the clock on the MLX thread.
        first_token: from the submission of the long prompt to its first token.
        share: tokens a second of the running streams while it lasted, of those before.
        slice: the last whole prefill chunk, measured alone before it.
    """

    step: float
    gap: float
    where: float
    thread_gap: float
    first_token: float
    share: float
    slice: float = 0.0

    @property
    def of_bound(self) -> float:
        """The longest gap over (3 steps + 1 slice)."""
        return self.gap / (3 * self.step + self.slice)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done in every trial."""

    streams: int
    long_prompt: int
    cancels: int

    def short(self, place: int) -> list[int]:
        return [64 + (7 * place + i) % 90 for i in range(16 + 4 * place)]

    def long(self) -> list[int]:
        return [64 + i % 89 for i in range(self.long_prompt)]


class Running:
    """Streams that run, and when they gave what; entered, they have all begun.

    Attributes:
        times: for each stream, when each of its chunks of one token was read.
        calls: when the logits processor of the first one was called, on the MLX thread.
    """

    def __init__(self, engine: BatchedEngine, plan: Plan) -> None:
        self._engine = engine
        self._plan = plan
        self.times: list[list[float]] = [[] for _ in range(plan.streams)]
        self.calls: list[float] = []
        self._changed = asyncio.Event()

    async def _read(self, place: int) -> None:
        def note(tokens: mx.array, logits: mx.array) -> mx.array:
            self.calls.append(time.perf_counter())
            return logits

        async with self._engine.stream_generate(
            self._plan.short(place),
            max_tokens=None,  # as many as the context holds: they outlast the join
            ignore_eos=True,
            logits_processors=[note] if place == 0 else (),
        ) as chunks:
            async for chunk in chunks:
                if chunk.tokens:
                    self.times[place].append(time.perf_counter())
                    self._changed.set()
        raise RuntimeError("a running stream came to its end before the join did")

    async def steps(self, count: int) -> None:
        """Wait until every stream has made this many tokens more."""
        wanted = [len(times) + count for times in self.times]
        while any(len(times) < want for times, want in zip(self.times, wanted, strict=True)):
            self._changed.clear()
            async with asyncio.timeout(60):
                await self._changed.wait()
            for task in self._tasks:
                if task.done():
                    task.result()

    async def beside(self, work: Awaitable[T]) -> tuple[float, list[float], T]:
        """The longest gap while the work is done, all gaps of a while before, and what it gives."""
        begin = time.perf_counter()
        await self.steps(BEFORE)
        start = time.perf_counter()
        gave = await work
        end = time.perf_counter()
        await self.steps(5)
        return longest(self.times, start, end)[0], gaps(self.times, begin, start), gave

    async def __aenter__(self) -> Running:
        self._tasks = [asyncio.create_task(self._read(i)) for i in range(self._plan.streams)]
        await self.steps(5)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


async def engine_join(engine: BatchedEngine, plan: Plan) -> Join:
    async with Running(engine, plan) as running:
        begin = time.perf_counter()
        await running.steps(BEFORE)
        start = time.perf_counter()
        async with engine.stream_generate(plan.long(), max_tokens=AFTER, ignore_eos=True) as chunks:
            first = 0.0
            async for _ in chunks:
                first = first or time.perf_counter()
        await running.steps(5)
    return judge(running.times, [running.calls], begin, start, first)


def judge(
    times: list[list[float]],
    thread_times: list[list[float]],
    begin: float,
    start: float,
    first: float,
) -> Join:
    """What the times at which tokens came tell of a join that lasted from start to first."""
    rate = sum(begin <= t <= start for stream in times for t in stream) / (start - begin)
    joining = sum(start < t <= first for stream in times for t in stream) / (first - start)
    gap, over = longest(times, start, first)
    return Join(
        step=statistics.median(gaps(times, begin, start)),
        gap=gap,
        where=(over - start) / (first - start),
        thread_gap=longest(thread_times, start, first)[0],
        first_token=first - start,
        share=joining / rate,
    )


def gaps(times: list[list[float]], begin: float, end: float) -> list[float]:
    """Those between the tokens of each stream that came in [begin, end]."""
    within = ([t for t in stream if begin <= t <= end] for stream in times)
    return [later - earlier for stream in within for earlier, later in pairwise(stream)]


def longest(times: list[list[float]], start: float, first: float) -> tuple[float, float]:
    """The longest gap of any stream that overlaps [start, first], and when it was over."""
    return max(
        (later - earlier, later)
        for stream in times
        for earlier, later in pairwise(stream)
        if later > start and earlier < first
    )


def raw_join(engine: BatchedEngine, plan: Plan, step_size: int) -> Join:
    """On the MLX thread: the same with mlx_lm's batch."""
    generator = BatchGenerator(
        engine._holder.model().model, max_tokens=16_000, prefill_step_size=step_size
    )
    uids = generator.insert([plan.short(place) for place in range(plan.streams)])
    times: dict[int, list[float]] = {uid: [] for uid in uids}

    def step(until: int | None = None) -> bool:
        """One call; whether it gave a token of this request."""
        _, responses = generator.next()
        now = time.perf_counter()
        for response in responses:
            if response.uid in times:
                times[response.uid].append(now)
        return any(response.uid == until for response in responses)

    try:
        while any(len(stream) < 5 for stream in times.values()):
            step()
        begin = time.perf_counter()
        for _ in range(BEFORE):
            step()
        start = time.perf_counter()
        (joining,) = generator.insert([plan.long()])
        while not step(until=joining):
            pass
        first = time.perf_counter()
        for _ in range(5):
            step()
    finally:
        generator.close()
        mx.synchronize(generation_stream)
    return judge(list(times.values()), list(times.values()), begin, start, first)


def measure_chunks(engine: BatchedEngine, plan: Plan) -> list[float]:
    """On the MLX thread: seconds of each whole chunk of the long prompt, nothing else running."""
    model = engine._holder.model().model
    cache = make_prompt_cache(model)
    tokens = plan.long()
    seconds = []
    with mx.stream(generation_stream):
        for begin in range(0, len(tokens) - SLICE, SLICE):
            start = time.perf_counter()
            model(mx.array(tokens[begin : begin + SLICE])[None], cache=cache)
            mx.eval([entry.state for entry in cache])
            mx.clear_cache()
            seconds.append(time.perf_counter() - start)
    return seconds
