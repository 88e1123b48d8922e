"""Prefill: the prompt goes into the KV cache, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import Cache, quantize
from mlx_engine.turn import Interrupted


def prefill(
    model: nn.Module,
    cache: Cache,
    tokens: list[int],
    config: ModelConfig,
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> None:
    """Put all of ``tokens`` but the last into ``cache``; decoding starts with that one.

    Args:
        should_stop: asked before each chunk.
        on_progress: called with the number of tokens in the cache, after each chunk.

    Raises:
        Interrupted: ``should_stop`` said so; the cache holds the chunks done so far.
    """
    with mx.stream(generation_stream):
        end = len(tokens) - 1
        for start in range(0, end, config.prefill_step_size):
            if should_stop():
                raise Interrupted
            stop = min(start + config.prefill_step_size, end)
            model(mx.array(tokens[start:stop])[None], cache=cache)
            quantize(cache, config)
            # Without it the work would pile up unevaluated, and the check mean nothing.
            mx.eval([entry.state for entry in cache])
            mx.clear_cache()
            on_progress(stop)
    if should_stop():
        raise Interrupted
