"""What the requests of one engine share on the MLX thread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_engine.config import ModelConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.generation.cache.kv_cache import (
    Cache,
    check_kv_options,
    is_bounded_or_quantized,
    make_kv_cache,
    measure_kv,
)
from mlx_engine.generation.cache.prompt_cache import Hit, PromptCache
from mlx_engine.generation.equipment import StrategyRuntime, make_runtime, share_out
from mlx_engine.generation.request import Request
from mlx_engine.generation.sparse.sparse_cache import SparseKVCache
from mlx_engine.models.loading import LoadedModel
from mlx_engine.strategies import Strategies

_GUESS = 2**30  # bytes of prompt cache where nothing is known of the device's memory
_NEAR = 64  # tokens; for fewer it is not worth while to store a cache again
_SHARE = 0.9  # of what the model leaves; the rest is for activations and copies


@dataclass(frozen=True, slots=True)
class ModelRunner:
    """A loaded model and what belongs to it. Made, used and dropped on the MLX thread."""

    loaded: LoadedModel
    config: ModelConfig
    prompt_cache: PromptCache
    equipment: StrategyRuntime = field(default_factory=StrategyRuntime)
    meter: EngineCounters = field(default_factory=EngineCounters)

    def look_up(self, request: Request) -> tuple[Cache, Hit]:
        """A KV cache for a prepared request, with what is stored of its prompt in it."""
        hit = self.prompt_cache.fetch(request.prompt, request.request_id)
        self.meter.prompt_tokens += len(request.prompt)
        self.meter.cached_tokens += hit.cached
        cache = hit.cache or make_kv_cache(self.loaded.model, self.config)
        request.prefill_begins(hit.cached)
        return cache, hit

    def places_of(self, request: Request, hit: Hit) -> tuple[int, ...]:
        """Where the cache of a request that was looked up is to be stored, ascending."""
        cache = self.prompt_cache
        if not cache.limit:
            return ()
        step = cache.grid or 1
        places = {place // step * step for place in request.places}
        checkpoint = hit.checkpoint
        if checkpoint is not None and not any(0 <= checkpoint - p < _NEAR for p in places):
            places.add(checkpoint)
        return tuple(sorted(place for place in places if place > hit.cached))

    def store(
        self, tokens: list[int], cache: Cache, prefilled: int, places: Collection[int] = ()
    ) -> bool:
        """Keep what a request has computed; whether MLX did not fail at that.

        Nobody's answer depends on it: if it fails, the prompt cache is emptied. A cache that
        lacks tokens of its prompt is not kept.
        """
        if any(isinstance(entry, SparseKVCache) and entry.stored < entry.offset for entry in cache):
            return True
        whole = [e.dense() if isinstance(e, SparseKVCache) else e for e in cache]
        try:
            self.prompt_cache.store(tokens, whole, prefilled=prefilled, places=places)
        except Exception:  # noqa: BLE001 - the border: MLX raises anything
            self.prompt_cache.clear()
            return False
        return True

    def shrink_stored(self, limit: int) -> None:
        """Drop stored prompts, the drafts' too, until they take at most ``limit`` bytes."""
        caches = [self.prompt_cache, *(cache for cache, _ in self.equipment.side_caches)]
        total = sum(cache.nbytes for cache in caches)
        if total > limit:
            for cache in caches:
                cache.shrink(limit * cache.nbytes // total)


def make_runner(
    loaded: LoadedModel,
    config: ModelConfig,
    meter: EngineCounters,
    drafts: Mapping[str, LoadedModel] | None = None,
    strategies: Strategies | None = None,
) -> ModelRunner:
    """Of models that have just been loaded.

    Args:
        drafts: other models that the strategies need, by name.

    Raises:
        InvalidRequest: a strategy, or an option of the KV cache, does not suit the model.
        ModelLoadError: an MTP head cannot be loaded.
    """
    check_kv_options(loaded.model, config)
    # With a cache that is bounded or quantised while a prompt goes in, what comes out depends
    # on where the chunks begin, so that a prefix may be used up to such a place only.
    grid = config.prefill_step_size if is_bounded_or_quantized(config) else None
    cache = PromptCache(0, grid=grid, quantized_from=config.quantized_kv_start)
    equipment = make_runtime(loaded, drafts or {}, strategies or Strategies(), config, cache)
    limit = config.prompt_cache_bytes
    if limit is None:
        free = memory_for_caches()
        limit = _GUESS if free is None else free // 4
    share_out(limit, [(cache, measure_kv(loaded.model, config)), *equipment.side_caches])
    return ModelRunner(loaded, config, cache, equipment, meter)


def memory_for_caches() -> int | None:
    """Bytes of the device's memory that caches may take besides the loaded model, if known."""
    size = mx.device_info().get("max_recommended_working_set_size")
    if not isinstance(size, int):
        return None
    return max(0, int((size - mx.get_active_memory()) * _SHARE))
