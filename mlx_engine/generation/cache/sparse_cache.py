"""KV caches that hold some tokens of a prompt only, each at its true position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache, create_attention_mask

from mlx_engine.generation.cache.kv_cache import Cache


class SparseKVCache(KVCache):  # type: ignore[misc]
    """Keys and values of one layer, of fewer tokens than have gone by.

    mlx_lm's ``KVCache`` takes one number for two: where the next token is, which rotary
    embeddings are given, and how many tokens are stored, which masks are made for. Here they
    are apart, so that models need not be changed.

    Attributes:
        offset: position of the next token.
        stored: tokens that it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset: int = 0
        self.stored = 0

    @classmethod
    def of(cls, entry: KVCache) -> SparseKVCache:
        """A cache with the tokens of a dense one, which must not be written to afterwards."""
        new = cls()
        new.keys, new.values, new.offset = entry.state
        new.stored = new.offset
        return new

    def dense(self) -> KVCache:
        """A cache of the stored tokens as if no others were missing, on the same arrays."""
        entry = KVCache()
        entry.state = self.keys, self.values, self.stored
        return entry

    def skip_to(self, position: int) -> None:
        """Leave out the tokens before ``position``.

        Raises:
            ValueError: it is not ahead.
        """
        if position < self.offset:
            raise ValueError(f"position {position} is before {self.offset}")
        self.offset = position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (1, heads, tokens, dimension); all that is stored."""
        entry = self.dense()
        fetched: tuple[mx.array, mx.array] = entry.update_and_fetch(keys, values)
        self.keys, self.values, self.stored = entry.state
        self.offset += keys.shape[2]
        return fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Stored keys and values, of shape (1, heads, tokens, dimension)."""
        fetched: tuple[mx.array, mx.array] = self.dense().keys_and_values()
        return fetched

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask of ``n`` more tokens: each sees what is stored, and those before it.

        Raises:
            ValueError: for a sliding window, which would need the keys' positions.
        """
        _no_window(window_size)
        mask: mx.array | str | None = create_attention_mask(n, self.stored, return_array, None)
        return mask

    def trim(self, n: int) -> int:
        """Take back the last ``n`` tokens, which must follow each other."""
        n = min(n, self.stored)
        self.stored -= n
        self.offset -= n
        return n

    def size(self) -> int:
        """Tokens that it holds."""
        return self.stored

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int, int]:
        """Keys, values, position of the next token, and tokens stored."""
        return self.keys, self.values, self.offset, self.stored

    @state.setter
    def state(self, state: tuple[mx.array | None, mx.array | None, int, int]) -> None:
        self.keys, self.values, self.offset, self.stored = state

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Refuse to be quantised: the copy would lose the positions.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a sparse KV cache cannot be quantised")

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> BatchSparseKVCache:
        """A batch cache with a row for each of ``caches``, sparse or dense."""
        return BatchSparseKVCache.merge(caches)


class BatchSparseKVCache(BatchKVCache):  # type: ignore[misc]
    """Rows that hold fewer tokens than have gone by.

    Rows are padded on the left to the longest number of tokens stored; ``offset``, of shape
    (rows,), are the positions of their next tokens. Other batch caches may join it by
    ``extend``, but it must not join them: their ``extract`` would lose the positions.
    """

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> BatchSparseKVCache:
        """A row for each of ``caches``, sparse or dense."""
        dense = [entry.dense() if isinstance(entry, SparseKVCache) else entry for entry in caches]
        batch = cls([0] * len(caches))
        batch.state = BatchKVCache.merge(dense).state
        batch.offset = mx.array([entry.offset for entry in caches])
        return batch

    def extract(self, idx: int) -> SparseKVCache:
        """A cache of its own for a row."""
        entry = SparseKVCache()
        if self.keys is not None:
            entry = SparseKVCache.of(super().extract(idx))
        entry.offset = self.offset.tolist()[idx]
        return entry

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The mask of ``n`` more tokens a row, of shape (rows, 1, n, tokens).

        Raises:
            ValueError: for a sliding window, which would need the keys' positions.
        """
        _no_window(window_size)
        mask: mx.array = super().make_mask(n, return_array)
        return mask


def sparse(cache: Cache) -> Cache:
    """A request's cache, into which tokens may be put that do not follow each other.

    ``cache`` must not be used any more. Recurrent state takes tokens in order, wherever they
    are, and stays as it is.

    Raises:
        ValueError: names a class of cache that cannot be sparse.
    """
    return [_sparse(entry) for entry in cache]


def _sparse(entry: Any) -> Any:
    if type(entry) is KVCache:
        return SparseKVCache.of(entry)
    if type(entry) in (SparseKVCache, ArraysCache):
        return entry
    raise ValueError(f"a {type(entry).__name__} cannot be sparse")


def skip_to(cache: Cache, position: int) -> None:
    """Leave out the tokens before ``position``.

    Raises:
        ValueError: it is not ahead.
    """
    for entry in cache:
        if isinstance(entry, SparseKVCache):
            entry.skip_to(position)


def _no_window(window_size: int | None) -> None:
    if window_size is not None:
        raise ValueError("a sparse KV cache has no sliding window")
