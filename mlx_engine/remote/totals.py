"""The counters of several engines as those of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import get_args

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.memory_stats import MemoryStats, MemoryUse, PressureStage
from mlx_engine.outputs import (
    EngineState,
    EngineStats,
)

_STAGES = get_args(PressureStage)


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
        if field.name not in ("state", "prompt_cache", "memory")
    }
    memory = total_memory([part.memory for part in each])
    return EngineStats(state=state, prompt_cache=cache, memory=memory, **counted)


def total_memory(parts: Sequence[MemoryStats]) -> MemoryStats:
    """The memory of all ``parts`` together.

    Their limits add up, where all have one; the total is that of the largest machine, and the
    stage the worst one.
    """
    holding = [part for part in parts if part.use.total]
    limits = [part.limit for part in holding]
    return MemoryStats(
        total=max((part.total for part in parts if part.total is not None), default=None),
        limit=None if None in limits else sum(filter(None, limits)) or None,
        use=sum((part.use for part in parts), MemoryUse()),
        peak=sum(part.peak for part in parts),
        refused=sum(part.refused for part in parts),
        stage=max((part.stage for part in parts), key=_STAGES.index, default="none"),
        owners=tuple(owner for part in parts for owner in part.owners),
    )


def bygone(stats: EngineStats) -> EngineStats:
    """The counters that stay of an engine that is gone: nothing of what it held."""
    cache = replace(stats.prompt_cache, entries=0, nbytes=0, limit=0)
    memory = MemoryStats(refused=stats.memory.refused)
    nothing = replace(stats, running=0, waiting=0, batch_size=0, kv_bytes=0)
    return replace(nothing, prompt_cache=cache, memory=memory)
