"""Chunks of one prompt as the rows of a batch: one forward, each chunk at its own position.

The model sees a batch, with an offset for each row, as mlx_lm's rotary embeddings take them.
Attention sees one sequence again: queries, keys and values of all the rows one after another,
so that each token attends to all that is stored, to the rows before its own, and to its own.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_engine.generation.cache.attention_tap import plain_attention
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.sparse_cache import SparseKVCache


class FoldedKVCache:
    """A sparse cache as one forward of rows sees it; its own tap.

    Args:
        entry: gets the tokens.
        starts: position of each row's first token; rows are in order.

    Attributes:
        offset: of shape (rows,), positions of the next tokens.
    """

    def __init__(self, entry: SparseKVCache, starts: list[int]) -> None:
        self._entry = entry
        self._last = starts[-1]
        self.offset = mx.array(starts)

    @property
    def tap(self) -> FoldedKVCache:
        """Asked for the attention of this cache's layer."""
        return self

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str:
        """The mask of ``n`` more tokens a row; as an array, of shape (rows, 1, n, tokens).

        Raises:
            ValueError: for a sliding window, which would need the keys' positions.
        """
        if window_size is not None:
            raise ValueError("a sparse KV cache has no sliding window")
        if not return_array:
            return "causal"
        rows, stored = self.offset.size, self._entry.stored
        mask: mx.array = create_causal_mask(rows * n, stored).reshape(rows, 1, n, -1)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (rows, heads, tokens, dimension) in order; all that is stored, as one row."""
        tokens = keys.shape[2]
        fetched = self._entry.update_and_fetch(fold(keys), fold(values))
        self._entry.offset = self._last + tokens
        self.offset = self.offset + tokens
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """The output of attention, of shape (rows, heads, tokens, dimension).

        Args:
            queries: (rows, heads, tokens, dimension).
            keys, values: (1, heads, all tokens, dimension).
            mask: as ``make_mask`` gave it, or made from that.
        """
        rows, heads, tokens, _ = queries.shape
        if isinstance(mask, mx.array):
            mask = fold(mx.broadcast_to(mask, (rows, *mask.shape[1:])))
        out = plain_attention(fold(queries), keys, values, None, scale, mask, sinks)
        unfolded: mx.array = out.reshape(heads, rows, tokens, -1).transpose(1, 0, 2, 3)
        return unfolded


def fold(rows: mx.array) -> mx.array:
    """Rows of shape (rows, heads, tokens, dimension) as (1, heads, rows * tokens, dimension)."""
    count, heads, tokens, _ = rows.shape
    return rows.transpose(1, 0, 2, 3).reshape(1, heads, count * tokens, -1)


def folded(cache: Cache, starts: list[int]) -> Cache:
    """A sparse cache as one forward of rows sees it, which puts its tokens there.

    Args:
        starts: position of each row's first token, in order, none before what is held.
    """
    return [FoldedKVCache(entry, starts) for entry in cache]
