"""The ways to have many requests answered at once that ``benchmarks.throughput`` compares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import BatchGenerator

from mlx_engine import BatchedEngine

ROWS = 32  # of a batch, in every way


@dataclass(frozen=True, slots=True)
class Load:
    """Requests to submit at once.

    Attributes:
        prompts: token ids of each.
        count: tokens that each is to make.
    """

    prompts: list[list[int]]
    count: int

    @property
    def tokens(self) -> int:
        """That all make together."""
        return self.count * len(self.prompts)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one way gave, one entry a request: ids, seconds to the first, from there to the last."""

    tokens: list[list[int]]
    first: list[float]
    decode: list[float]


Way = Callable[[BatchedEngine, Load], Awaitable[Answer]]


async def raw(engine: BatchedEngine, load: Load) -> Answer:
    return await engine.run_blocking(_raw, engine, load, time.perf_counter(), False)


async def raw_with_text(engine: BatchedEngine, load: Load) -> Answer:
    return await engine.run_blocking(_raw, engine, load, time.perf_counter(), True)


def _raw(engine: BatchedEngine, load: Load, start: float, with_text: bool) -> Answer:
    """On the MLX thread, and with the very model that the engine uses."""
    loaded = engine._holder.model()
    generator = BatchGenerator(loaded.model, max_tokens=load.count, completion_batch_size=ROWS)
    uids = generator.insert(load.prompts)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    texts: dict[int, list[str]] = {uid: [] for uid in uids}
    detokenizers: dict[int, Any] = {}
    for uid in uids:
        detokenizers[uid] = loaded.tokenizer.detokenizer  # each time it gives a new one
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while len(last) < len(uids):
        _, responses = generator.next()
        now = time.perf_counter()
        for response in responses:
            uid = response.uid
            first.setdefault(uid, now)
            tokens[uid].append(response.token)
            if with_text:
                detokenizers[uid].add_token(response.token)
                texts[uid].append(detokenizers[uid].last_segment)
            if response.finish_reason is not None:
                last[uid] = now
    generator.close()
    return Answer(
        [tokens[uid] for uid in uids],
        [first[uid] - start for uid in uids],
        [last[uid] - first[uid] for uid in uids],
    )


async def generate(engine: BatchedEngine, load: Load) -> Answer:
    results = await asyncio.gather(
        *(
            engine.generate(prompt, max_tokens=load.count, ignore_eos=True)
            for prompt in load.prompts
        )
    )
    return Answer(
        [list(result.tokens) for result in results],
        [result.timings.time_to_first_token for result in results],
        [result.timings.decode for result in results],
    )


async def stream(engine: BatchedEngine, load: Load) -> Answer:
    start = time.perf_counter()

    async def read(prompt: list[int]) -> tuple[list[int], float, float]:
        tokens: list[int] = []
        text = ""
        first = 0.0
        async with engine.stream_generate(prompt, max_tokens=load.count, ignore_eos=True) as chunks:
            async for chunk in chunks:
                if not tokens:
                    first = time.perf_counter() - start
                text += chunk.text
                tokens.extend(chunk.tokens)
        return tokens, first, chunks.result.timings.decode

    read_all = await asyncio.gather(*map(read, load.prompts))
    return Answer(*(list(column) for column in zip(*read_all, strict=True)))


WAYS: dict[str, Way] = {
    "raw": raw,
    "raw again": raw,
    "raw + text": raw_with_text,
    "generate": generate,
    "stream": stream,
}
