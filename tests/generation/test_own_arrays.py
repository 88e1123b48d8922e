"""What a KV cache holds is its own: what was claimed for it, and no activations besides."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import grow, kv_nbytes, make_kv_cache, measure_kv
from mlx_engine.generation.prefill import padded_prefill, prefill_chunk
from tests.architectures import make, words
from tests.conftest import on_mlx_thread

pytestmark = pytest.mark.anyio

CONFIG = ModelConfig(model="tiny")
SPARE = 2**14  # bytes of a larger array that MLX leaves an array in, rather than copy it
CHUNKS = ((0, 512), (512, 700), (700, 701), (701, 1213))


def active() -> int:
    mx.synchronize(generation_stream)
    held: int = mx.get_active_memory()
    return held


@pytest.mark.parametrize("kind", ["plamo2", "phi3", "deepseek_v41", "nemotron-nas", "gemma3_text"])
@on_mlx_thread
def test_it_holds_what_was_claimed_after_every_chunk_and_token(kind: str) -> None:
    model: Any = make(kind)
    footprint, prompt = measure_kv(model, CONFIG), words(1, 1213)
    before, cache = active(), make_kv_cache(model, CONFIG)
    arrays = 5 * len(cache)  # at most
    for start, end in CHUNKS:
        prefill_chunk(model, cache, prompt, start, end, CONFIG)
        assert kv_nbytes(cache) <= footprint.nbytes(end)
        assert active() - before <= footprint.nbytes(end) + arrays * SPARE
    for count in range(1214, 1300):
        with mx.stream(generation_stream):
            grow(cache, 1)
            mx.eval(model(mx.array([[count % 50]]), cache=cache))
        assert kv_nbytes(cache) <= footprint.nbytes(count)
    least = footprint.nbytes(1300) - footprint.nbytes(256)  # it is not all fixed, and true
    assert kv_nbytes(cache) >= 0.9 * least > 100_000


@on_mlx_thread
def test_so_does_a_batch_that_is_prefilled_together() -> None:
    model: Any = make("phi3")
    footprint = measure_kv(model, CONFIG)
    before = active()
    cache = merge([make_kv_cache(model, CONFIG) for _ in range(2)])
    padded_prefill(model, cache, [words(1, 512), words(2, 512)])
    assert active() - before <= 2 * footprint.nbytes(512) + 2 * len(cache) * SPARE
