"""What one long row costs a batch of short ones, with mlx-lm's caches: see ``memory.py``.

A ``BatchKVCache`` of mlx-lm 0.32.2 is one array of (rows, heads, longest, dimension) a layer, its
rows padded on the left: ``merge`` and ``extend`` pad to the longest, ``filter`` takes off what
all rows have in common, and every step of attention reads all of it. There are no pages, so that
within one of them padding cannot be avoided. Several of them are possible, each with a forward
pass of its own: offsets and masks belong to a cache, and ``extract`` and ``merge`` move a row
from one to another. A pass more reads the weights once more. So a group of its own pays where the
padding that is read is more than that:

    rows x (longest - their own longest) x bytes a token  >  bytes of the weights
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.setting import rotated
from mlx_engine import SimpleEngine
from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes

ROWS = 32
SHORT = 64  # tokens of a short row
STEPS = 24
KINDS = ("short", "one long", "split")
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch, or two.

    Attributes:
        step: median seconds of a decode step of all rows.
        nbytes: of their KV caches, after the last step.
    """

    step: float
    nbytes: int


async def measure_padding(
    folder: str, lengths: Sequence[int], rounds: int
) -> dict[int, dict[str, list[Padded]]]:
    """By the tokens of the long row, and by kind, an entry a round."""
    found: dict[int, dict[str, list[Padded]]] = {
        tokens: {kind: [] for kind in KINDS} for tokens in lengths
    }
    async with SimpleEngine(folder, prompt_cache_bytes=0) as engine:
        for turn in range(rounds):
            for tokens in lengths:
                for kind in rotated(list(KINDS), turn):
                    one = await engine.run_blocking(_measure, engine, kind, tokens)
                    found[tokens][kind].append(one)
    return found


def _measure(engine: SimpleEngine, kind: str, tokens: int) -> Padded:
    """On the MLX thread."""
    model: Any = engine._holder.model().model
    short = [SHORT] * (ROWS if kind == "short" else ROWS - 1)
    long = [] if kind == "short" else [tokens]
    groups = [short, long] if kind == "split" else [short + long]
    seconds = []
    with mx.stream(generation_stream):
        batches = [merge([_filled(model, size) for size in group]) for group in groups]
        mx.eval([[entry.state for entry in batch] for batch in batches])
        for _ in range(STEPS):
            start = time.perf_counter()
            for batch, group in zip(batches, groups, strict=True):
                logits = model(mx.full((len(group), 1), 70), cache=batch)
                mx.eval(mx.argmax(logits[:, -1], axis=-1), [entry.state for entry in batch])
            seconds.append(time.perf_counter() - start)
    mx.clear_cache()
    return Padded(statistics.median(seconds), sum(map(kv_nbytes, batches)))


def _filled(model: Any, tokens: int) -> Cache:
    """The KV cache of a row."""
    cache = make_prompt_cache(model)
    for begin in range(0, tokens, _CHUNK):
        ids = [64 + i % 89 for i in range(begin, min(tokens, begin + _CHUNK))]
        model(mx.array(ids)[None], cache=cache)
        mx.eval([entry.state for entry in cache])
    return cache
