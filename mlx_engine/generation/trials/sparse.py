"""Trial of a prompt that is prefilled in parts: does a model give then what it should?

A few tokens are tried when an engine starts, against the same tokens in a dense cache in which
those that are left out are masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_engine.core.stop import Interrupted, checkpoint
from mlx_engine.generation.cache.attention_tap import install
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.row_fold import folded
from mlx_engine.generation.cache.sparse_cache import skip_to, sparse
from mlx_engine.generation.trials.same_logits import TOLERANCE, difference

_CHUNK = 4
_STARTS = [0, 40, 60, 80]  # of the chunks that are tried
_END = _STARTS[-1] + _CHUNK  # position of the token whose logits are compared
_KEPT = [at for start in _STARTS for at in range(start, start + _CHUNK)] + [_END]
_TOKENS = [at % 13 + 1 for at in range(_END + 1)]  # ids that every model has
# Wrong by 8 % of the logits' span: queries take their positions from the length of what is stored.
_KNOWN = {"afm7": "its queries have no positions of their own"}


@dataclass(frozen=True, slots=True)
class SparseSupport:
    """The ways in which a target's prefill can be sparse.

    Attributes:
        reason: why its prefill cannot be sparse; ``None`` if it can.
        rows: whether chunks may be rows of a batch.
    """

    reason: str | None
    rows: bool = False


def check_sparse(model: nn.Module) -> SparseSupport:
    """Try a model without some tokens. On the MLX thread; raises ``Interrupted`` if told to."""
    cache = make_prompt_cache(model)
    odd = {type(entry).__name__ for entry in cache} - {"KVCache", "ArraysCache"}
    if odd:
        return SparseSupport(f"its {', '.join(sorted(odd))} cannot leave tokens out")
    if not any(isinstance(entry, KVCache) for entry in cache):
        return SparseSupport("it has no layer with attention")
    known = _KNOWN.get(getattr(model, "model_type", ""))
    if known is not None:
        return SparseSupport(known)
    hybrid = any(isinstance(entry, ArraysCache) for entry in cache)
    try:
        expected = _one_by_one(model) if hybrid else _masked(model)
        off = _difference(expected, _runs(model))
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001 - the border: a model raises anything
        return SparseSupport(f"leaving tokens out fails ({type(error).__name__}: {error})")
    if not off <= TOLERANCE:
        return SparseSupport(f"it goes wrong without some tokens (by {off:.0%})")
    return SparseSupport(None, rows=not hybrid and _rows_fit(model, expected))


def _rows_fit(model: nn.Module, expected: list[mx.array]) -> bool:
    install(model)
    try:
        return _difference(expected, _rows(model)) <= TOLERANCE
    except Interrupted:
        raise
    except Exception:  # noqa: BLE001 - the border: a model raises anything
        return False


class _MaskedKVCache(KVCache):  # type: ignore[misc]
    """A dense cache whose tokens outside of the chunks nobody sees."""

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        seen = mx.array([at in _KEPT for at in range(self.offset + n)])
        itself = mx.arange(self.offset + n) == mx.arange(self.offset, self.offset + n)[:, None]
        mask: mx.array = create_causal_mask(n, self.offset) & (seen | itself)
        return mask


def _masked(model: nn.Module) -> list[mx.array]:
    """Outcome of a dense cache in which others than the kept tokens are not seen."""
    cache: Cache = [_MaskedKVCache() for _ in make_prompt_cache(model)]
    with mx.stream(generation_stream):
        _put(model, cache, [_TOKENS[:_END]])
        return _outcome(model, cache, mx.array(_KEPT))


def _one_by_one(model: nn.Module) -> list[mx.array]:
    """Outcome of a forward for each token: masks are not needed then."""
    cache = sparse(make_prompt_cache(model))
    with mx.stream(generation_stream):
        for at in _KEPT[:-1]:
            skip_to(cache, at)
            _put(model, cache, [_TOKENS[at : at + 1]])
        return _outcome(model, cache)


def _runs(model: nn.Module) -> list[mx.array]:
    """Outcome of a forward for each chunk."""
    cache = sparse(make_prompt_cache(model))
    with mx.stream(generation_stream):
        for start in _STARTS:
            skip_to(cache, start)
            _put(model, cache, [_TOKENS[start : start + _CHUNK]])
        return _outcome(model, cache)


def _rows(model: nn.Module) -> list[mx.array]:
    """Outcome of the first chunk before the others, which are rows."""
    cache = sparse(make_prompt_cache(model))
    with mx.stream(generation_stream):
        _put(model, cache, [_TOKENS[:_CHUNK]])
        rows = [_TOKENS[start : start + _CHUNK] for start in _STARTS[1:]]
        _put(model, folded(cache, _STARTS[1:]), rows)
        return _outcome(model, cache)


def _put(model: nn.Module, cache: Cache, tokens: list[list[int]]) -> None:
    checkpoint()
    mx.eval(model(mx.array(tokens), cache=cache))


def _outcome(model: nn.Module, cache: Cache, at: mx.array | None = None) -> list[mx.array]:
    """Logits of the last token; keys and values of each layer, or those ``at`` some places."""
    checkpoint()
    logits = model(mx.array([_TOKENS[-1:]]), cache=cache)[0, -1]
    stored = [
        array if at is None else array[..., at, :]
        for entry in cache
        if isinstance(entry, KVCache) and not entry.empty()
        for array in entry.keys_and_values()
    ]
    return [logits, *stored]


def _difference(expected: list[mx.array], outcome: list[mx.array]) -> float:
    """The largest difference, as a part of the span of what it is in."""
    pairs = zip(expected, outcome, strict=True)
    return max(difference(a.reshape(1, -1), b.reshape(1, -1)) for a, b in pairs)
