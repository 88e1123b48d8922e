"""All stored prompts of an engine, its drafts' too, in the ledger of the process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mlx_engine.core.ledger import Account
from mlx_engine.generation.cache.prompt_cache import PromptCache


class StoredPrompts:
    """The prompt caches of an engine: what they take is claimed. On the MLX thread.

    Args:
        caches: all of them.
        account: of the engine.
    """

    def __init__(self, caches: Sequence[PromptCache], account: Account) -> None:
        self._caches = caches
        self._account = account
        for cache in caches:
            cache.claim = partial(self._claim, cache)
        account.stored = self

    def oldest(self) -> float | None:
        """When that was used which was not used for longest; ``None`` if nothing is stored."""
        ages = (cache.oldest() for cache in self._caches)
        return min((age for age in ages if age is not None), default=None)

    def evict(self) -> None:
        """Drop that."""
        filled = [cache for cache in self._caches if cache.oldest() is not None]
        if filled:
            min(filled, key=lambda cache: cache.oldest() or 0).evict()

    def _claim(self, one: PromptCache, nbytes: int) -> bool:
        total = nbytes + sum(cache.nbytes for cache in self._caches if cache is not one)
        if nbytes > one.nbytes:
            return self._account.claim("stored", total)
        self._account.set("stored", total)  # it is so already
        return True
