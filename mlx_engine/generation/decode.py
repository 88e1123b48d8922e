"""Decode: one token after another, by mlx_lm's own step."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import Cache
from mlx_engine.generation.request import Request
from mlx_engine.params import LogitsProcessor
from mlx_engine.turn import Interrupted


def decode(
    model: nn.Module, cache: Cache, request: Request, config: ModelConfig
) -> Generator[tuple[int, mx.array], None, None]:
    """Yield (token, log-probabilities of shape (vocabulary,)) until closed or the limit.

    Args:
        cache: holds all of the prompt but its last token.

    Raises:
        Interrupted: the request was cancelled; asked before each step is handed to MLX.
    """
    sampling, prompt = request.sampling, request.prompt
    assert sampling is not None
    sampler = sampling.sampler

    def sample(logprobs: mx.array) -> mx.array:
        # mlx_lm prepares a step before it gives out the token of the one before; this is the
        # last moment at which it can be left undone.
        if request.should_stop:
            raise Interrupted
        return sampler(logprobs)

    history = mx.array(prompt[:-1], dtype=mx.uint32)
    return generate_step(  # type: ignore[no-any-return]
        mx.array(prompt[-1:], dtype=mx.uint32),
        model,
        max_tokens=-1 if request.limit is None else request.limit,
        sampler=sample,
        logits_processors=[partial(_with_history, p, history) for p in sampling.processors],
        prompt_cache=cache,
        kv_bits=config.kv_bits,
        kv_group_size=config.kv_group_size,
        quantized_kv_start=config.quantized_kv_start,
    )


def _with_history(
    processor: LogitsProcessor, history: mx.array, tokens: mx.array, logits: mx.array
) -> mx.array:
    """Show a processor the whole prompt: ``generate_step`` knows only what it was given."""
    return processor(mx.concatenate([history, tokens]), logits)
