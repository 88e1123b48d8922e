"""What the requests of one engine share on the MLX thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_engine.config import ModelConfig
from mlx_engine.generation.kv_cache import Cache, is_bounded_or_quantized, make_kv_cache
from mlx_engine.generation.prompt_cache import Hit, PromptCache
from mlx_engine.generation.request import Request
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

    def look_up(self, request: Request) -> tuple[Cache, Hit]:
        """A KV cache for a prepared request, with what is stored of its prompt in it."""
        hit = self.prompt_cache.fetch(request.prompt, request.request_id)
        self.meter.prompt_tokens += len(request.prompt)
        self.meter.cached_tokens += hit.cached
        cache = hit.cache or make_kv_cache(self.loaded.model, self.config)
        request.prefill_begins(hit.cached)
        return cache, hit

    def store(self, tokens: list[int], cache: Cache, prefilled: int) -> bool:
        """Keep what a request has computed; whether MLX did not fail at that.

        Nobody's answer depends on it: if it fails, the prompt cache is emptied.
        """
        try:
            self.prompt_cache.store(tokens, cache, prefilled=prefilled)
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            self.prompt_cache.clear()
            return False
        return True


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
