"""What the requests of one engine share on the MLX thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import is_bounded_or_quantized
from mlx_engine.generation.prompt_cache import PromptCache
from mlx_engine.models.loading import LoadedModel

_GUESS = 2**30  # bytes of prompt cache where nothing is known of the device's memory
_SHARE = 0.9  # of what the model leaves; the rest is for activations and copies


@dataclass(slots=True)
class Meter:
    """Counters of the work done. Written on the MLX thread, read from any; see EngineStats."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    batch_size: int = 0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Workspace:
    """A loaded model and what belongs to it. Made, used and dropped on the MLX thread."""

    loaded: LoadedModel
    config: ModelConfig
    prompt_cache: PromptCache
    meter: Meter = field(default_factory=Meter)


def make_workspace(loaded: LoadedModel, config: ModelConfig, meter: Meter) -> Workspace:
    """Of a model that has just been loaded."""
    limit = config.prompt_cache_bytes
    if limit is None:
        free = memory_for_caches()
        limit = _GUESS if free is None else free // 4
    # With a cache that is bounded or quantised while a prompt goes in, what comes out depends
    # on where the chunks begin, so that a prefix may be used up to such a place only.
    grid = config.prefill_step_size if is_bounded_or_quantized(config) else None
    cache = PromptCache(limit, grid=grid, quantized_from=config.quantized_kv_start)
    return Workspace(loaded, config, cache, meter)


def memory_for_caches() -> int | None:
    """Bytes of the device's memory that caches may take besides the loaded model, if known."""
    size = mx.device_info().get("max_recommended_working_set_size")
    if not isinstance(size, int):
        return None
    return max(0, int((size - mx.get_active_memory()) * _SHARE))
