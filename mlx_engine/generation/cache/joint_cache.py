"""The joint KV cache of a batch, copied whenever a row comes or goes, and when its rows grow.

mlx-lm's caches give a new array for an old one, and MLX makes it when something needs it. Were
it asked for all layers at once, both could be there, old and new, of all of them. Here some
arrays are asked for, and made, before the next, whose old ones are there still: a part in 32 of
the cache, or 32 MB, or one array. Within ``mx.stream(generation_stream)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_engine.generation.cache.kv_cache import Cache, kv_nbytes, make_in_turn


def merge(caches: Sequence[Cache]) -> Cache:
    """Batch caches of mlx_lm, one a layer, with a row for each of ``caches``."""
    joint: Cache = []
    make_in_turn(_merged(joint, caches), sum(map(kv_nbytes, caches)))
    return joint


def extend(cache: Cache, caches: Sequence[Cache], *, joint: bool, batched: bool) -> None:
    """Add rows to a cache, in place.

    Args:
        caches: of the rows, empty lists afterwards.
        joint: whether there is one of all of them, a batch cache.
        batched: whether ``cache`` is one; else it becomes one.
    """
    total = kv_nbytes(cache) + sum(map(kv_nbytes, caches))
    make_in_turn(_extended(cache, caches, joint, batched), total)


def keep_rows(cache: Cache, rows: Sequence[int], taken: Sequence[int]) -> list[Cache]:
    """Keep some rows of a batch cache, in place; a cache of its own for each that is taken.

    Args:
        rows: to be kept; if there is only one, it has a cache of its own then.
        taken: others.
    """
    own: list[Cache] = [[] for _ in taken]
    make_in_turn(_kept(cache, rows, list(zip(taken, own, strict=True))), kv_nbytes(cache))
    return own


def _merged(joint: Cache, caches: Sequence[Cache]) -> Iterator[Any]:
    for layers in zip(*caches, strict=True):
        joint.append(layers[0].merge(list(layers)))
        yield joint[-1]


def _extended(cache: Cache, caches: Sequence[Cache], joint: bool, batched: bool) -> Iterator[Any]:
    for layer, entries in enumerate(_layers(caches)):
        new = entries[0] if joint else entries[0].merge(entries)
        if not batched:
            cache[layer] = cache[layer].merge([cache[layer]])
        cache[layer].extend(new)
        yield cache[layer]


def _kept(cache: Cache, rows: Sequence[int], taken: Sequence[tuple[int, Cache]]) -> Iterator[Any]:
    for layer, entry in enumerate(cache):
        for row, own in taken:
            own.append(_row(entry, row))
            yield own[-1]
        if len(rows) == 1:
            cache[layer] = _row(entry, rows[0])
        elif rows:
            entry.filter(rows)
        else:
            cache[layer] = None
        if rows:
            yield cache[layer]


def _row(entry: Any, row: int) -> Any:
    """A row of a layer as a cache of its own."""
    if isinstance(entry, BatchKVCache) and entry.keys is None:
        return KVCache()  # the model does not use it, and mlx_lm 0.32.2 cannot take a row of it
    return entry.extract(row)


def _layers(caches: Sequence[Cache]) -> Iterator[list[Any]]:
    """The entries of each layer, which nobody else has then."""
    for cache in caches:
        cache.reverse()
    while caches[0]:
        yield [cache.pop() for cache in caches]
