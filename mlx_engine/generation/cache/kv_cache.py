"""Making the KV cache of a request, bounded or quantised as the engine was asked to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_engine.config import ModelConfig
from mlx_engine.errors import InvalidRequest

_FEW, _MANY = 8, 32  # parts of a cache that are copied one after another: each costs a wait
_LITTLE = 2**25  # bytes of one of a few
_TENTH = 9  # parts of memory that are claimed, for one that is not and copies may have
_ATTENTION_SINK = 4  # first tokens that a bounded cache keeps, as in mlx_lm
_PROBE = 1023  # tokens: more than deepseek_v41's window, and one short of any of its groups

Cache = list[Any]  # one entry a layer, of mlx_lm's cache classes, which share no public base
_USUAL = (KVCache, QuantizedKVCache, RotatingKVCache, ChunkedKVCache, ArraysCache)


def make_kv_cache(model: nn.Module, config: ModelConfig) -> Cache:
    """An empty KV cache.

    mlx_lm ignores ``max_kv_size`` for every model that makes its own cache, plain llama
    included; here it is honoured.

    Raises:
        InvalidRequest: the model has caches that cannot be bounded.
    """
    cache: Cache = make_prompt_cache(model)
    limit = config.max_kv_size
    if limit is None:
        return cache
    return [_bounded(entry, limit) for entry in cache]


def _bounded(entry: Any, limit: int) -> Any:
    if type(entry) is KVCache:
        return RotatingKVCache(max_size=limit, keep=_ATTENTION_SINK)
    if isinstance(entry, ArraysCache):
        return entry  # recurrent state has one size
    if isinstance(entry, RotatingKVCache) and entry.max_size <= limit:
        return entry
    if isinstance(entry, RotatingKVCache):
        raise InvalidRequest(
            "max_kv_size",
            f"must be at least {entry.max_size}, the sliding window of this model, not {limit}",
        )
    raise InvalidRequest(
        "max_kv_size", f"this model's {type(entry).__name__} cannot be bounded; leave it out"
    )


def sample_kv_cache(model: nn.Module, config: ModelConfig) -> Cache:
    """A KV cache with one token in it, quantised if the engine quantises."""
    cache = make_kv_cache(model, config)
    with mx.stream(generation_stream):
        mx.eval(model(mx.array([[0]]), cache=cache))
        if config.kv_bits is not None:
            maybe_quantize_kv_cache(cache, 0, config.kv_group_size, config.kv_bits)
        mx.eval([entry.state for entry in cache])
    return cache


def check_unbounded(option: str, config: ModelConfig) -> None:
    """Refuse ``option`` together with a bounded or quantised KV cache.

    Raises:
        InvalidRequest: names both.
    """
    for other in ("kv_bits", "max_kv_size"):
        if getattr(config, other) is not None:
            raise InvalidRequest(option, f"cannot be combined with {other}; leave one out")


def quantize(cache: Cache, config: ModelConfig) -> None:
    """Quantise in place the entries that have come to the length from which it is asked for."""
    if config.kv_bits is not None:
        maybe_quantize_kv_cache(
            cache, config.quantized_kv_start, config.kv_group_size, config.kv_bits
        )


def check_kv_options(model: nn.Module, config: ModelConfig) -> None:
    """Try the KV cache options on one token, so that a bad one is told at load.

    Raises:
        InvalidRequest: the model cannot have such a cache.
    """
    cache = make_kv_cache(model, config)
    if config.kv_bits is None:
        return
    try:
        for _ in range(2):
            mx.eval(model(mx.array([[0]]), cache=cache))
            maybe_quantize_kv_cache(cache, 0, config.kv_group_size, config.kv_bits)
    except Exception as error:
        advice = "leave kv_bits out"
        if "group size" in str(error):
            advice = "kv_group_size must divide the model's head dimension"
        raise InvalidRequest(
            "kv_bits",
            f"this model's KV cache cannot be quantised with kv_bits={config.kv_bits} and "
            f"kv_group_size={config.kv_group_size} ({type(error).__name__}: {error}); {advice}",
        ) from error
    if not any(hasattr(entry, "bits") for entry in cache):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in cache}))
        raise InvalidRequest("kv_bits", f"this model's cache ({kinds}) cannot be quantised")


def kv_nbytes(cache: Cache) -> int:
    """Bytes that a cache has allocated."""
    total: int = sum(entry.nbytes for entry in cache)
    return total


def grow(cache: Cache, tokens: int) -> None:
    """Make room for so many more tokens, in whole steps of all that it holds then.

    mlx_lm's caches add a step to what they hold, wherever that ends: up to a step more than the
    footprint says, in every row.
    """
    short = [part for part in cache_parts(cache) if _is_short(part, tokens)]
    if short:
        make_in_turn(_with_room(short, tokens), kv_nbytes(short))


def _is_short(part: Any, tokens: int) -> bool:
    """Whether there is no room in it for so many more."""
    if not isinstance(part, KVCache | BatchKVCache) or part.keys is None:
        return False
    room: int = part.keys.shape[2]
    return _held(part) + tokens > room


def _held(part: KVCache | BatchKVCache) -> int:
    held: int = part._idx if isinstance(part, BatchKVCache) else part.size()
    return held


def _with_room(parts: Cache, tokens: int) -> Iterator[Any]:
    for part in parts:
        held = _held(part)
        size = -(-(held + tokens) // KVCache.step) * KVCache.step
        part.keys = _grown(part.keys, held, size)
        part.values = _grown(part.values, held, size)
        yield part


def _grown(array: mx.array, held: int, size: int) -> mx.array:
    rows, heads, _, dimension = array.shape
    spare = mx.zeros((rows, heads, size - held, dimension), array.dtype)
    return mx.concatenate([array[..., :held, :], spare], axis=2)


def make_in_turn(entries: Iterable[Any], total: int) -> None:
    """Have the arrays of these be made, of some of them at a time.

    Args:
        entries: asked for as they are taken.
        total: bytes of all of them, roughly.
    """
    most, held = _part(total), 0
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


def _part(total: int) -> int:
    """Bytes of copies that may be there at a time."""
    return max(min(total // _FEW, _LITTLE), total // _MANY)


def _arrays(entry: Any) -> Iterator[mx.array]:
    """The arrays of a layer, none of which is a part of a larger one that stays because of it.

    What the layer has to itself is not copied.
    """
    for part in cache_parts([entry]):
        if isinstance(part, ArraysCache):
            keep_own_states(part)
            yield from (state for state in part.cache if state is not None)
            continue
        held = [name for name, value in vars(part).items() if isinstance(value, mx.array)]
        for name in held:
            if getattr(part, name).ndim > 1:  # the others are lengths
                setattr(part, name, mx.contiguous(getattr(part, name)))
                yield getattr(part, name)


def keep_own_states(part: ArraysCache) -> None:
    """Let recurrent states that are parts of larger arrays not keep those; when they are made."""
    part.cache = [None if state is None else mx.contiguous(state) for state in part.cache]


def keep_own_arrays(cache: Cache) -> None:
    """Let no layer keep activations of a prefill chunk alive; of batches, too; when it is made.

    Recurrent states are the end of some, and MLX makes no copy of keys and values that fill an
    array whole: they stay a part of the projection of queries, keys and values.
    """
    for entry in cache:
        for _ in _arrays(entry):
            pass  # each is the layer's own when it has been named


def keep_windows(cache: Cache) -> None:
    """Let bounded layers hold no more than they need; of batches, too; when it is made.

    mlx_lm's hold a prefill chunk besides, of which they drop what is too much with the next tokens:
    many times a small window, in every layer, and in every row of the batch that it joins.
    """
    for part in cache_parts(cache):
        if isinstance(part, ChunkedKVCache):
            part.maybe_trim_front()  # as the model does, before the next tokens
        elif isinstance(part, RotatingKVCache | BatchRotatingKVCache) and part.keys is not None:
            held = part.keys.shape[2]
            over = held - part.max_size
            if over <= 0 or part._idx != held:
                continue
            part.keys, part.values = part._trim(over, part.keys), part._trim(over, part.values)
            part._idx = part.max_size
            if isinstance(part, BatchRotatingKVCache):
                part.left_padding -= over


def cache_parts(cache: Cache) -> Iterator[Any]:
    """The caches in it that are not made of others."""
    for entry in cache:
        if isinstance(entry, CacheList):
            yield from cache_parts(list(entry.caches))
        else:
            yield entry


@dataclass(frozen=True, slots=True)
class KVFootprint:
    """Bytes that one request's KV cache takes.

    Attributes:
        fixed: bytes whatever its length.
        layers: (bytes a token, most tokens kept or ``None``) of each layer that grows.
    """

    fixed: int
    layers: tuple[tuple[int, int | None], ...]

    def nbytes(self, tokens: int) -> int:
        """Bytes for so many tokens; caches grow in steps."""
        return self.fixed + sum(self._layers(tokens))

    def claim(self, tokens: int, rows: int = 1, besides: int = 0) -> int:
        """Bytes to be had for so many rows of as many tokens.

        Those of ``nbytes``, and room for the copy of a layer that is made when they grow, come or
        go: as much of it as the tenth, which is kept free of whatever is claimed, is too small
        for. With ten layers that grow, or with little memory, there is none of that.

        Args:
            besides: bytes of drafts, which have a tenth kept free, too.
        """
        own = rows * self.nbytes(tokens) + besides
        copied = rows * max(self._layers(tokens), default=0)
        return own + max(0, copied - max(own // _TENTH, _LITTLE))

    def tokens(self, nbytes: int) -> int | None:
        """The most tokens of one row that fit into so many bytes; ``None`` if any number does."""
        if self.claim(2**40) <= nbytes:
            return None
        low, high = 0, 2**40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.claim(middle) <= nbytes else (low, middle)
        return low

    def _layers(self, tokens: int) -> Iterator[int]:
        held: int = -(-tokens // KVCache.step) * KVCache.step
        for size, most in self.layers:
            yield size * (held if most is None else min(held, most))


def joined(footprints: Sequence[KVFootprint]) -> KVFootprint:
    """The footprint of several KV caches of one request: its own, and those of its drafts."""
    return KVFootprint(
        sum(each.fixed for each in footprints),
        tuple(layer for each in footprints for layer in each.layers),
    )


def measure_kv(model: nn.Module, config: ModelConfig) -> KVFootprint:
    """The footprint of a model's KV cache, found by putting one token into it, or some more."""
    return joined([footprint_of(sample_kv_cache(model, config)), unusual_of(model, config)])


def footprint_of(cache: Cache) -> KVFootprint:
    """The footprint of a request's cache, by one that has a token in it.

    Layers that the model does not use take nothing, and those of unusual classes are left out.
    """
    fixed = 0
    layers: list[tuple[int, int | None]] = []
    for part in cache_parts(cache):
        if isinstance(part, ArraysCache):
            fixed += part.nbytes
        elif isinstance(part, _USUAL) and part.keys is not None:
            keys = part.keys[0] if isinstance(part, QuantizedKVCache) else part.keys
            layers.append((part.nbytes // keys.shape[2], _most(part)))
    return KVFootprint(fixed, tuple(layers))


def unusual_of(model: nn.Module, config: ModelConfig) -> KVFootprint:
    """The footprint of a model's layers whose caches are of its own classes, deepseek_v41's.

    Nothing tells how those grow, so that two numbers of tokens are compared. They go through the
    model, and nothing that comes of that is evaluated.
    """
    cache = make_kv_cache(model, config)
    parts = [part for part in cache_parts(cache) if not isinstance(part, _USUAL)]
    if not parts:
        return KVFootprint(0, ())
    sizes: list[list[int]] = []
    for tokens in (_PROBE, _PROBE + 1):  # the same place in a group of tokens, both times
        model(mx.zeros((1, tokens), mx.int32), cache=cache)
        sizes.append([part.nbytes for part in parts])
    each = [-(-(after - before) // (_PROBE + 1)) for before, after in zip(*sizes, strict=True)]
    fixed = sum(max(0, size - _PROBE * token) for size, token in zip(sizes[0], each, strict=True))
    return KVFootprint(fixed, tuple((token, None) for token in each))


def _most(part: Any) -> int | None:
    """Tokens that a layer keeps at most, between two prefill chunks; ``None`` is no bound."""
    most: int | None = None
    if isinstance(part, RotatingKVCache):
        most = part.max_size
    elif isinstance(part, ChunkedKVCache):  # it grows by a step beyond that, and is cut then
        most = part.chunk_size + part.step
    return most
