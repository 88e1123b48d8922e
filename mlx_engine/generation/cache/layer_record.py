"""Caches of layers as plain data and named arrays, for files, and whether they fit a model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_engine.generation.cache.kv_cache import Cache

# What may come from a file: these classes, with these attributes, which are all they have.
_CLASSES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "KVCache": (KVCache, ("keys", "values", "offset")),
    "QuantizedKVCache": (QuantizedKVCache, ("keys", "values", "offset", "group_size", "bits")),
    "RotatingKVCache": (
        RotatingKVCache,
        ("keys", "values", "offset", "keep", "max_size", "_idx"),
    ),
    "ChunkedKVCache": (
        ChunkedKVCache,
        ("keys", "values", "offset", "chunk_size", "start_position"),
    ),
    "ArraysCache": (ArraysCache, ("cache", "left_padding", "lengths")),
    "CacheList": (CacheList, ("caches",)),
}
_PER_PROMPT = ("offset", "_idx", "start_position")  # what two prompts of a model differ in


def can_be_recorded(cache: Cache) -> bool:
    """Whether every class in it is known, with all the attributes that it has here."""
    for entry in cache:
        kind, names = _CLASSES.get(type(entry).__name__, (None, ()))
        if type(entry) is not kind or set(vars(entry)) != set(names):
            return False
        if kind is CacheList and not can_be_recorded(list(entry.caches)):
            return False
    return True


def record(value: Any, found: dict[str, mx.array]) -> Any:
    """``value`` as JSON can have it; its arrays go into ``found`` under new names.

    Args:
        value: a cache for which ``can_be_recorded`` is true, or a part of one.
    """
    if isinstance(value, mx.array):
        name = str(len(found))
        found[name] = value
        return {"array": name}
    if isinstance(value, (list, tuple)):
        return [record(each, found) for each in value]
    if value is None or isinstance(value, int):
        return value
    name = type(value).__name__
    return {"class": name} | {
        attribute: record(getattr(value, attribute), found) for attribute in _CLASSES[name][1]
    }


def rebuild(recorded: Any, found: dict[str, mx.array]) -> Any:
    """The value that ``record`` was given.

    Raises:
        ValueError, LookupError, TypeError: it is nothing that ``record`` gives.
    """
    if isinstance(recorded, list):
        return [rebuild(each, found) for each in recorded]
    if recorded is None or type(recorded) is int:
        return recorded
    if not isinstance(recorded, dict):
        raise ValueError(f"{recorded!r} is no part of a cache")
    if "array" in recorded:
        return found[recorded["array"]]
    kind, names = _CLASSES[recorded["class"]]
    entry = object.__new__(kind)  # all its attributes follow
    for name in names:
        setattr(entry, name, rebuild(recorded[name], found))
    return entry


def holds(entry: Any, tokens: int) -> bool:
    """Whether a rebuilt layer's offsets and arrays are those of a cache of ``tokens``."""
    if isinstance(entry, CacheList):
        return all(holds(part, tokens) for part in entry.caches)
    if isinstance(entry, ArraysCache):
        return True  # it does not count
    if entry.keys is None and entry.values is None:
        return bool(entry.offset == 0)
    sizes = {array.shape[-2] for _, array in tree_flatten([entry.keys, entry.values])}
    if len(sizes) != 1 or entry.offset != tokens:
        return False
    size = sizes.pop()
    if isinstance(entry, RotatingKVCache) and not entry.is_trimmable():
        return bool(entry.max_size <= size <= tokens and entry.keep <= entry._idx <= size)
    if isinstance(entry, RotatingKVCache):
        return bool(size == tokens == entry._idx)
    start = getattr(entry, "start_position", 0)
    return bool(start >= 0 and size == tokens - start)


def fits(cache: Cache, template: Cache, *, until_quantized: bool) -> bool:
    """Whether two caches differ in their tokens only: same layers, heads, dimensions, dtypes.

    Args:
        until_quantized: the template's layers are quantised, those of ``cache`` perhaps
            not yet.
    """
    if len(cache) != len(template):
        return False
    for entry, wanted in zip(cache, template, strict=True):
        if until_quantized and type(entry) is KVCache and isinstance(wanted, QuantizedKVCache):
            try:  # nothing is computed, but the shapes are known
                entry = entry.to_quantized(group_size=wanted.group_size, bits=wanted.bits)
            except (ValueError, RuntimeError):
                return False
        if _kind(entry) != _kind(wanted):
            return False
    return True


def _kind(entry: Any) -> Any:
    """The part of a layer's cache that is the same for all prompts of a model."""
    _, names = _CLASSES.get(type(entry).__name__, (None, ()))
    by_token = not isinstance(entry, ArraysCache)
    fixed = [name for name in names if name not in _PER_PROMPT]
    return type(entry), [_outline(getattr(entry, name), by_token) for name in fixed]


def _outline(value: Any, by_token: bool) -> Any:
    """Shapes, all but the number of tokens, and dtypes; other values as they are."""
    if isinstance(value, mx.array):
        shape = value.shape
        return (*shape[:-2], shape[-1]) if by_token else shape, value.dtype
    if isinstance(value, (list, tuple)):
        return [_outline(each, by_token) for each in value]
    return _kind(value) if type(value).__name__ in _CLASSES else value
