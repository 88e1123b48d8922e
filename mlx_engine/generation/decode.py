"""Decode: one token after another, by mlx_lm's own step."""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import Cache
from mlx_engine.generation.request import Request
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

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        # ``generate_step`` knows only the last token of the prompt.
        return request.process(mx.concatenate([history, tokens]), logits)

    return generate_step(  # type: ignore[no-any-return]
        mx.array(prompt[-1:], dtype=mx.uint32),
        model,
        max_tokens=-1 if request.limit is None else request.limit,
        sampler=sample,
        logits_processors=[process] if sampling.processors else None,
        prompt_cache=cache,
        kv_bits=config.kv_bits,
        kv_group_size=config.kv_group_size,
        quantized_kv_start=config.quantized_kv_start,
    )
