"""Decode: one token after another, by mlx_lm's own step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from contextlib import closing
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_engine.config import ModelConfig
from mlx_engine.core.stop import Interrupted
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampler import can_be_sampled


def decode(
    model: nn.Module, cache: Cache, request: Request, config: ModelConfig
) -> Generator[tuple[int, mx.array], None, None]:
    """Yield (token, log-probabilities of shape (vocabulary,)) until closed or the limit.

    Args:
        cache: holds all of the prompt but its last token.

    Raises:
        Interrupted: the request was cancelled; asked before each step is handed to MLX.
        GenerationError: a token's logits are not numbers.
    """
    sampling, prompt = request.sampling, request.prompt
    assert sampling is not None
    history = mx.array(prompt[:-1], dtype=mx.uint32)
    before: mx.array | None = None  # whether the model's own logits were sound, if known
    checks: deque[tuple[mx.array, mx.array | None]] = deque()  # of tokens not given out yet
    positions = itertools.count()

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal before
        if request.context is not None:
            before = mx.isfinite(mx.logsumexp(logits, axis=-1))
        # ``generate_step`` knows only the last token of the prompt.
        return request.process(mx.concatenate([history, tokens]), logits)

    def sample(logprobs: mx.array) -> mx.array:
        # mlx_lm prepares a step before it gives out the token of the one before; this is the
        # last moment at which it can be left undone.
        if request.should_stop:
            raise Interrupted
        tokens = sampling.sample(logprobs, next(positions))
        sound = can_be_sampled(logprobs, tokens)
        checks.append((sound, before))
        # Computed with the token, for what is asked for later waits for the next step.
        known = [sound] if before is None else [sound, before]
        return cast("mx.array", mx.depends([tokens], known)[0])

    steps = generate_step(
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
    with closing(steps):
        for token, logprobs in steps:
            sound, model_was = checks.popleft()
            if not sound.item():
                raise request.nothing_to_sample(by_model=model_was is None or not model_was.item())
            yield token, logprobs
