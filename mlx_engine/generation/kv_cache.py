"""Making the KV cache of a request, bounded or quantised as the engine was asked to."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest

_ATTENTION_SINK = 4  # first tokens that a bounded cache keeps, as in mlx_lm

Cache = list[Any]  # one entry a layer, of mlx_lm's cache classes, which share no public base


def make_kv_cache(model: nn.Module, config: ModelConfig) -> Cache:
    """An empty KV cache.

    mlx_lm ignores ``max_kv_size`` for every model that makes its own cache, plain llama
    included; here it is honoured.

    Raises:
        InvalidRequest: the model has caches that cannot be bounded.
    """
    cache: Cache = make_prompt_cache(model)
    limit = config.max_kv_size
    if limit is None:
        return cache
    return [_bounded(entry, limit) for entry in cache]


def _bounded(entry: Any, limit: int) -> Any:
    if type(entry) is KVCache:
        return RotatingKVCache(max_size=limit, keep=_ATTENTION_SINK)
    if isinstance(entry, ArraysCache):
        return entry  # recurrent state has one size
    if isinstance(entry, RotatingKVCache) and entry.max_size <= limit:
        return entry
    if isinstance(entry, RotatingKVCache):
        raise InvalidRequest(
            "max_kv_size",
            f"must be at least {entry.max_size}, the sliding window of this model, not {limit}",
        )
    raise InvalidRequest(
        "max_kv_size", f"this model's {type(entry).__name__} cannot be bounded; leave it out"
    )


def quantize(cache: Cache, config: ModelConfig) -> None:
    """Quantise in place the entries that have come to the length from which it is asked for."""
    if config.kv_bits is not None:
        maybe_quantize_kv_cache(
            cache, config.quantized_kv_start, config.kv_group_size, config.kv_bits
        )


def check_kv_options(model: nn.Module, config: ModelConfig) -> None:
    """Try the KV cache options on one token, so that a bad one is told at load.

    Raises:
        InvalidRequest: the model cannot have such a cache.
    """
    cache = make_kv_cache(model, config)
    if config.kv_bits is None:
        return
    try:
        for _ in range(2):
            mx.eval(model(mx.array([[0]]), cache=cache))
            maybe_quantize_kv_cache(cache, 0, config.kv_group_size, config.kv_bits)
    except Exception as error:
        advice = "leave kv_bits out"
        if "group size" in str(error):
            advice = "kv_group_size must divide the model's head dimension"
        raise InvalidRequest(
            "kv_bits",
            f"this model's KV cache cannot be quantised with kv_bits={config.kv_bits} and "
            f"kv_group_size={config.kv_group_size} ({type(error).__name__}: {error}); {advice}",
        ) from error
    if not any(hasattr(entry, "bits") for entry in cache):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in cache}))
        raise InvalidRequest("kv_bits", f"this model's cache ({kinds}) cannot be quantised")
