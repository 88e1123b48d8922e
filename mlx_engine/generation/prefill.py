"""Prefill: the prompt goes into the KV cache, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import Cache, quantize


def chunk_end(start: int, length: int, step: int, checkpoint: int | None = None) -> int:
    """Where the chunk that begins at token ``start`` ends.

    Chunks end at multiples of ``step``, wherever the first one began, at ``checkpoint``, and
    before the last of ``length`` tokens, with which decoding starts.
    """
    end = min((start // step + 1) * step, length - 1)
    if checkpoint is not None and start < checkpoint < end:
        return checkpoint
    return end


def prefill_chunk(
    model: nn.Module, cache: Cache, tokens: list[int], start: int, end: int, config: ModelConfig
) -> None:
    """Put ``tokens[start:end]`` into ``cache``, which holds those before."""
    with mx.stream(generation_stream):
        model(mx.array(tokens[start:end])[None], cache=cache)
        quantize(cache, config)
        # Without it the work would pile up unevaluated, and a cancel check mean nothing.
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()


def padded_prefill(model: nn.Module, cache: Cache, prompts: Sequence[Sequence[int]]) -> None:
    """Put prompts of different lengths into a batch cache in one forward, padded on the right."""
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    tokens = mx.array([[*p, *[0] * pad] for p, pad in zip(prompts, padding, strict=True)])
    with mx.stream(generation_stream):
        if any(padding):
            for entry in cache:
                entry.prepare(lengths=lengths, right_padding=padding)
        model(tokens, cache=cache)
        mx.eval([entry.state for entry in cache])
        if any(padding):
            for entry in cache:
                entry.finalize()
            mx.eval([entry.state for entry in cache])
        mx.clear_cache()
