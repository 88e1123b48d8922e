"""The counters of several engines as those of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.outputs import (
    EngineState,
    EngineStats,
)


def total(state: EngineState, parts: Iterable[EngineStats]) -> EngineStats:
    """All ``parts`` added up, as an engine in ``state``.

    Whose lookup in a prompt cache was the latest is not known: there is no ``last_lookup``.
    """
    each = list(parts)
    caches = [part.prompt_cache for part in each]
    cache = PromptCacheStats(
        **{
            field.name: sum(getattr(one, field.name) for one in caches)
            for field in fields(PromptCacheStats)
            if field.name != "last_lookup"
        }
    )
    counted = {
        field.name: sum(getattr(part, field.name) for part in each)
        for field in fields(EngineStats)
        if field.name not in ("state", "prompt_cache")
    }
    return EngineStats(state=state, prompt_cache=cache, **counted)


def bygone(stats: EngineStats) -> EngineStats:
    """The counters that stay of an engine that is gone: nothing of what it held."""
    cache = replace(stats.prompt_cache, entries=0, nbytes=0, limit=0)
    return replace(stats, running=0, waiting=0, batch_size=0, kv_bytes=0, prompt_cache=cache)
