"""Copies of KV caches that share their buffers, and cutting them back to fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_engine.generation.cache.kv_cache import Cache, cache_parts

# Keys and values of shape (batch, heads, tokens, dimension), and a trim() that moves offsets only.
_BY_TOKEN = (KVCache, QuantizedKVCache, RotatingKVCache, ChunkedKVCache, ConcatenateKVCache)
_Take = Callable[[mx.array, int | None], mx.array]
_SPARE = 8  # spare capacity of up to an eighth is kept rather than copied away


def snapshot(cache: Cache, length: int | None = None) -> Cache:
    """A copy that can be written into: new cache objects on the same buffers.

    Writing replaces an array inside of its Python object, ``keys[..., a:b, :] = x``, so the
    copy has Python objects of its own; MLX copies a shared buffer at the first write to it.
    They are sliced to the tokens that are valid, so that a write never copies spare capacity.

    Args:
        length: tokens to keep; fewer than there are only if ``trimmable(cache)``.
    """
    return [_copied(entry, length, _view) for entry in cache]


State = list[Any]  # one entry a layer; None where the layer can be cut back by itself


def state_beside(cache: Cache, whole: Cache) -> tuple[State, int]:
    """The state of ``cache`` in layers in which a longer one cannot be cut back to it.

    Args:
        whole: of a prompt that begins with the tokens of ``cache``.

    Returns:
        What ``cut_to`` takes besides ``whole``, and its bytes. Nothing is evaluated yet.
    """
    held = 0

    def take(array: mx.array, tokens: int | None) -> mx.array:
        nonlocal held
        kept = mx.contiguous(_view(array, tokens))
        held += kept.nbytes
        return kept

    def state(entry: Any, longer: Any) -> Any:
        if isinstance(entry, CacheList):
            return [state(*pair) for pair in zip(entry.caches, longer.caches, strict=True)]
        return None if _can_be_cut(longer) else _copied(entry, None, take)

    return [state(*pair) for pair in zip(cache, whole, strict=True)], held


def cut_to(whole: Cache, state: State, length: int) -> Cache:
    """A snapshot of ``whole`` as it was after ``length`` tokens.

    Args:
        state: of that place, as ``state_beside`` has given it.
    """

    def cut(entry: Any, kept: Any) -> Any:
        if isinstance(entry, CacheList):
            return CacheList(*(cut(*pair) for pair in zip(entry.caches, kept, strict=True)))
        return _copied(entry, length, _view) if kept is None else _copied(kept, None, _view)

    return [cut(*pair) for pair in zip(whole, state, strict=True)]


def state_arrays(state: State) -> list[mx.array]:
    """Every array in it."""
    parts: list[mx.array] = []
    for entry in state:
        if isinstance(entry, list):
            parts += state_arrays(entry)
        elif entry is not None:
            parts += arrays([entry])
    return parts


def packed(cache: Cache, length: int | None = None) -> tuple[Cache, int]:
    """A snapshot to be kept for long, and the bytes of memory that it holds.

    What is only a part of a larger buffer is copied, unless the rest is at most an eighth
    of it; that rest is counted then. Nothing is evaluated yet.
    """
    held = 0

    def take(array: mx.array, tokens: int | None) -> mx.array:
        nonlocal held
        kept = _view(array, tokens)
        if tokens is not None and 0 < _SPARE * (array.shape[-2] - tokens) <= array.shape[-2]:
            held += array.nbytes
            return kept
        held += kept.nbytes
        return mx.contiguous(kept) if tokens in (None, array.shape[-2]) else _alone(kept)

    return [_copied(entry, length, take) for entry in cache], held


def _alone(part: mx.array) -> mx.array:
    """A copy in a buffer of its own: ``contiguous`` makes none of one head's first tokens."""
    return mx.concatenate([part, part[..., :0, :]], axis=-2)


def _copied(entry: Any, length: int | None, take: _Take) -> Any:
    """A copy of one layer's cache, its arrays made by ``take(array, tokens)``.

    Not by ``from_state(state)``: that fails for an empty ConcatenateKVCache, for a CacheList
    of classes from outside of mlx_lm.models.cache, and for deepseek_v41's LayerCache.
    """
    if isinstance(entry, CacheList):
        return CacheList(*(_copied(part, length, take) for part in entry.caches))
    new = copy.copy(entry)
    tokens: int | None = None
    if isinstance(new, _BY_TOKEN) and not new.empty():
        if length is not None:
            new.trim(new.offset - length)
        tokens = _valid(new)
    for name, value in list(vars(new).items()):
        setattr(new, name, tree_map(lambda leaf: _taken(leaf, tokens, take), value))
    return new


def _taken(leaf: Any, tokens: int | None, take: _Take) -> Any:
    return take(leaf, tokens) if isinstance(leaf, mx.array) else leaf


def _valid(entry: Any) -> int | None:
    """Tokens that its arrays hold, from their beginning on; ``None`` is all, in any order."""
    if isinstance(entry, RotatingKVCache) and not entry.is_trimmable():
        return None
    if isinstance(entry, ChunkedKVCache):
        return entry.offset - entry.start_position  # type: ignore[no-any-return]
    return entry.offset  # type: ignore[no-any-return]


def _view(array: mx.array, tokens: int | None) -> mx.array:
    """A new Python object on the same buffer, with the first ``tokens`` of it."""
    if tokens is None or tokens == array.shape[-2]:
        return array[...]
    return array[..., :tokens, :]


def arrays(cache: Cache) -> list[mx.array]:
    """Every array in it."""
    found = tree_flatten([list(vars(entry).values()) for entry in cache_parts(cache)])
    return [leaf for _, leaf in found if isinstance(leaf, mx.array)]


def length(cache: Cache) -> int | None:
    """Tokens in it. ``None`` if no layer counts them (recurrent state only); 0 if it is
    empty, or its layers do not agree.
    """
    offsets = [getattr(entry, "offset", None) for entry in cache_parts(cache)]
    counted = [offset for offset in offsets if isinstance(offset, int)]
    if not counted:
        return None
    used = {offset for offset in counted if offset}  # some models have layers that stay unused
    return used.pop() if len(used) == 1 else 0


def trimmable(cache: Cache) -> bool:
    """Whether it can be cut back to any number of tokens."""
    return all(_can_be_cut(entry) for entry in cache_parts(cache))


def _can_be_cut(entry: Any) -> bool:
    return (
        isinstance(entry, _BY_TOKEN)
        and bool(entry.is_trimmable())
        # It calls itself trimmable even when it has dropped the tokens that it would need.
        and getattr(entry, "start_position", 0) == 0
    )


def is_quantized(cache: Cache) -> bool:
    """Whether some layer of it is quantised."""
    return any(isinstance(entry, QuantizedKVCache) for entry in cache_parts(cache))


def has_dropped(cache: Cache) -> bool:
    """Whether a bounded layer (``max_kv_size``; not a sliding window) dropped tokens."""
    return any(
        isinstance(entry, RotatingKVCache) and entry.keep > 0 and not entry.is_trimmable()
        for entry in cache_parts(cache)
    )
