"""Caches of sliding windows: they hold the window, and no prefill chunk besides."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from mlx_engine.config import ModelConfig
from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import kv_nbytes, make_kv_cache, measure_kv
from mlx_engine.generation.prefill import padded_prefill, prefill_chunk
from tests.architectures import CONFIG as ARCHITECTURE
from tests.architectures import make, words
from tests.conftest import on_mlx_thread

pytestmark = pytest.mark.anyio

CONFIG = ModelConfig(model="tiny")
BOUNDED = ModelConfig(model="tiny", max_kv_size=24)
PROMPT = words(1, 300)


def next_logits(model: Any, cache: list[Any], tokens: list[int]) -> Any:
    with mx.stream(generation_stream):
        return np.array(model(mx.array([[each] for each in tokens]), cache=cache)[:, -1])


def check(config: ModelConfig, kind: str, **other: Any) -> None:
    model = make(kind, **other)
    footprint = measure_kv(model, config)
    cache, plain = make_kv_cache(model, config), make_kv_cache(model, config)
    for start, end in ((0, 100), (100, 101), (101, 290)):
        prefill_chunk(model, cache, PROMPT, start, end, config)
        assert kv_nbytes(cache) <= footprint.nbytes(end)
        with mx.stream(generation_stream):
            model(mx.array([PROMPT[start:end]]), cache=plain)
            mx.eval([entry.state for entry in plain])
    for count, token in enumerate(PROMPT[290:], 291):
        assert (next_logits(model, cache, [token]) == next_logits(model, plain, [token])).all()
        assert kv_nbytes(cache) <= footprint.nbytes(count)


@on_mlx_thread
def test_a_prefilled_window_holds_no_chunk_and_gives_the_same_logits() -> None:
    check(CONFIG, "gemma3_text")


@on_mlx_thread
def test_so_does_one_whose_attention_is_in_chunks() -> None:
    text = {"model_type": "llama4_text", "attention_chunk_size": 24, "num_hidden_layers": 4}
    text |= {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
    check(CONFIG, "llama4", text_config={**ARCHITECTURE, **text})


@on_mlx_thread
def test_so_does_a_bounded_cache_that_keeps_the_first_tokens() -> None:
    check(BOUNDED, "llama")


@on_mlx_thread
def test_so_do_those_that_are_prefilled_together() -> None:
    model = make("gemma3_text")
    footprint = measure_kv(model, CONFIG)
    prompts = [PROMPT[:100], PROMPT[50:90], PROMPT[200:210]]
    merged = merge([make_kv_cache(model, CONFIG) for _ in prompts])
    padded_prefill(model, merged, prompts)
    assert kv_nbytes(merged) <= len(prompts) * footprint.nbytes(100)
    alone = []
    for prompt in prompts:
        alone.append(make_prompt_cache(model))
        prefill_chunk(model, alone[-1], prompt, 0, len(prompt), CONFIG)
    for token in range(1, 40):
        together = next_logits(model, merged, [token] * 3)
        apart = [next_logits(model, cache, [token])[0] for cache in alone]
        assert np.allclose(together, apart, atol=1e-3)
