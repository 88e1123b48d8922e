"""The joint KV cache of a batch, copied whenever a row comes or goes, and when its rows grow.

mlx-lm's caches give a new array for an old one, and MLX makes it when something needs it. Were
it asked for all layers at once, both could be there, old and new, of all of them. Here some
arrays are asked for, and made, before the next: a part in 32 of the cache, or one array, whose
old one is there still. Within ``mx.stream(generation_stream)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_engine.generation.cache.kv_cache import Cache, cache_parts, kv_nbytes

_PARTS = 32  # into so many, roughly, a cache is divided: each costs a wait for MLX
_LEAST = 2**24  # bytes; a smaller cache is not


def merge(caches: Sequence[Cache]) -> Cache:
    """Batch caches of mlx_lm, one a layer, with a row for each of ``caches``."""
    joint: Cache = []
    _make(_merged(joint, caches), sum(map(kv_nbytes, caches)))
    return joint


def extend(cache: Cache, caches: Sequence[Cache], *, joint: bool, batched: bool) -> None:
    """Add rows to a cache, in place.

    Args:
        caches: of the rows, empty lists afterwards.
        joint: whether there is one of all of them, a batch cache.
        batched: whether ``cache`` is one; else it becomes one.
    """
    total = kv_nbytes(cache) + sum(map(kv_nbytes, caches))
    _make(_extended(cache, caches, joint, batched), total)


def keep_rows(cache: Cache, rows: Sequence[int], taken: Sequence[int]) -> list[Cache]:
    """Keep some rows of a batch cache, in place; a cache of its own for each that is taken.

    Args:
        rows: to be kept; if there is only one, it has a cache of its own then.
        taken: others.
    """
    own: list[Cache] = [[] for _ in taken]
    _make(_kept(cache, rows, list(zip(taken, own, strict=True))), kv_nbytes(cache))
    return own


def grow(cache: Cache, tokens: int) -> None:
    """Make room for so many more tokens, in whole steps of all that it holds then.

    mlx_lm's caches add a step to what they hold, wherever that ends: up to a step more than the
    footprint says, in every row.
    """
    _make(_with_room(cache, tokens), kv_nbytes(cache))


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
            own.append(entry.extract(row))
            yield own[-1]
        if len(rows) == 1:
            cache[layer] = entry.extract(rows[0])
        elif rows:
            entry.filter(rows)
        else:
            cache[layer] = None
        if rows:
            yield cache[layer]


def _with_room(cache: Cache, tokens: int) -> Iterator[Any]:
    for part in cache_parts(cache):
        if not isinstance(part, KVCache | BatchKVCache) or part.keys is None:
            continue
        held = part._idx if isinstance(part, BatchKVCache) else part.size()
        if held + tokens > part.keys.shape[2]:
            size = -(-(held + tokens) // KVCache.step) * KVCache.step
            part.keys = _grown(part.keys, held, size)
            part.values = _grown(part.values, held, size)
            yield part


def _grown(array: mx.array, held: int, size: int) -> mx.array:
    rows, heads, _, dimension = array.shape
    spare = mx.zeros((rows, heads, size - held, dimension), array.dtype)
    return mx.concatenate([array[..., :held, :], spare], axis=2)


def _layers(caches: Sequence[Cache]) -> Iterator[list[Any]]:
    """The entries of each layer, which nobody else has then."""
    for cache in caches:
        cache.reverse()
    while caches[0]:
        yield [cache.pop() for cache in caches]


def _make(entries: Iterable[Any], total: int) -> None:
    """Have the arrays of these be made, of some of them at a time.

    Args:
        entries: asked for as they are taken.
        total: bytes of all of them, roughly.
    """
    most, held = max(_LEAST, total // _PARTS), 0
    asked: list[mx.array] = []
    for entry in entries:
        for array in _arrays(entry):
            if asked and held + array.nbytes > most:
                mx.eval(asked)
                asked, held = [], 0
            asked.append(array)
            held += array.nbytes
    if asked:
        mx.eval(asked)


def _arrays(entry: Any) -> Iterator[mx.array]:
    """The arrays of a layer, none of which is a part of a larger one that stays because of it."""
    for part in cache_parts([entry]):
        for name in ("keys", "values"):
            if isinstance(getattr(part, name, None), mx.array):
                setattr(part, name, mx.contiguous(getattr(part, name)))
                yield getattr(part, name)
        states: Iterable[object] = getattr(part, "cache", ())
        yield from (state for state in states if isinstance(state, mx.array))
