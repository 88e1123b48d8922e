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
        claims = _Claims(account, len(caches))  # which the caches have, and which has none of them
        for number, cache in enumerate(caches):
            cache.room = partial(claims.room, number)
            cache.claim = partial(claims.claim, number)
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


class _Claims:
    """Bytes of each of several prompt caches, by number, claimed together."""

    def __init__(self, account: Account, count: int) -> None:
        self._account = account
        self._nbytes = [0] * count

    def room(self, number: int) -> int | None:
        """Bytes that one of them may come to."""
        room = self._account.room("stored")
        return None if room is None else max(0, room - sum(self._nbytes) + self._nbytes[number])

    def claim(self, number: int, nbytes: int) -> bool:
        """Have so many bytes in one of them, if that is less than before or there is room."""
        total = sum(self._nbytes) - self._nbytes[number] + nbytes
        if not self._account.claim("stored", total):
            return False
        self._nbytes[number] = nbytes
        return True
