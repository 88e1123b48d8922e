"""Taking tokens back out of a KV cache, for those that were proposed and rejected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_engine.generation.cache.kv_cache import Cache, cache_parts
from mlx_engine.generation.cache.snapshot import snapshot


def cannot_roll_back(cache: Cache) -> str | None:
    """The reason why tokens cannot be taken back out of it exactly; ``None`` if they can."""
    for part in cache_parts(cache):
        name = type(part).__name__
        if isinstance(part, RotatingKVCache) and part.keep:
            return f"its {name} keeps its first tokens while others fall out (max_kv_size)"
        if not isinstance(part, KVCache | RotatingKVCache | ArraysCache):
            return f"its {name} cannot give tokens back"
    return None


class Rollback:
    """A cache as it was before tokens that may be rejected.

    Layers that hold one entry a token are trimmed. Recurrent state and sliding windows cannot
    be: a copy of what they were is put back, and everything since then has to go in again.

    Args:
        cache: changed in place.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._others = [i for i, entry in enumerate(cache) if not _is_trimmed(entry)]
        self._marked: Sequence[Any] = ()

    def mark(self) -> None:
        """Remember the cache as it is."""
        self._marked = snapshot([self._cache[i] for i in self._others])

    def take_back(self, rejected: int, since_mark: int) -> int:
        """Undo the last ``rejected`` of the ``since_mark`` tokens that went in since ``mark``.

        Returns:
            How many of them are in the cache now: 0 if all had to be undone.
        """
        if not self._others:
            kept = since_mark - rejected
        else:
            kept = 0
            for i, entry in zip(self._others, self._marked, strict=True):
                self._cache[i] = entry
        for entry in self._cache:
            if _is_trimmed(entry):
                entry.trim(since_mark - kept)
        self._marked = ()
        return kept


def _is_trimmed(entry: Any) -> bool:
    return all(isinstance(part, KVCache) for part in cache_parts([entry]))
