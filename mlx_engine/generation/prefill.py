"""Prefill: tokens of a prompt go into the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_engine.config import ModelConfig
from mlx_engine.core.stop import checkpoint
from mlx_engine.generation.cache.kv_cache import (
    Cache,
    grow,
    keep_own_arrays,
    keep_windows,
    make_kv_cache,
    quantize,
)

_LONGEST = 1.0  # seconds of a chunk, roughly: a cancelled request leaves with its chunk
_SMALLEST = 16  # tokens of one, however slow the model is
_CAUTIOUS = 64  # tokens of the first one for which others wait, before any was measured
_SMOOTHING = 0.5  # weight of the newest chunk in the average


class ChunkSize:
    """The size of a model's prefill chunks.

    It is halved as often as a chunk takes longer than a second, and doubled again while one takes
    less than a quarter of that: so a model that is fast has the same chunks always, of all the
    tokens that may be in one. While others wait for it, a chunk has fewer, by what a token took.

    Args:
        most: tokens.
        fixed: whether it stays that, since answers depend on where chunks begin.
    """

    def __init__(self, most: int, *, fixed: bool) -> None:
        self._most = most
        self._fixed = fixed
        self._halvings = 0
        self._token_seconds = 0.0  # of the chunks by now; 0 is not known yet

    @property
    def tokens(self) -> int:
        """Tokens of the next chunk."""
        return self._most >> self._halvings

    def within(self, seconds: float | None) -> int:
        """Tokens of the next chunk if others wait for it, so many seconds at most, roughly;
        ``None`` is no bound.
        """
        if seconds is None:
            return self.tokens
        if not self._token_seconds:
            return min(_CAUTIOUS, self.tokens)
        fit = min(self._most, seconds / self._token_seconds)
        return min(self.tokens, max(_SMALLEST, int(fit)))

    def is_long(self, token_seconds: float) -> bool:
        """Whether a chunk takes long if a token takes so many seconds."""
        return token_seconds * self.tokens > _LONGEST

    def expect(self, token_seconds: float) -> None:
        """Begin with a size that suits a model which takes so many seconds a token, or fewer."""
        while self.is_long(token_seconds) and self._halve():
            pass

    def took(self, seconds: float, tokens: int) -> None:
        """Learn that a chunk of so many tokens took so long."""
        if tokens >= _SMALLEST:
            latest, known = seconds / tokens, self._token_seconds
            # Slower at once, faster by and by: a token takes longer the more are before it.
            self._token_seconds = max(latest, known + _SMOOTHING * (latest - known))
        if seconds > _LONGEST:
            self._halve()
        elif seconds < _LONGEST / 4 and tokens >= self.tokens and self._halvings:
            self._halvings -= 1

    def _halve(self) -> bool:
        if self._fixed or self.tokens // 2 < _SMALLEST:
            return False
        self._halvings += 1
        return True


def settle(cache: Cache, config: ModelConfig) -> None:
    """Have what a model was given into ``cache`` be there, in the form in which it is kept.

    Within ``mx.stream(generation_stream)``, as what gave it.
    """
    quantize(cache, config)
    keep_windows(cache)
    keep_own_arrays(cache)
    # Without it the work would pile up unevaluated, and a cancel check mean nothing.
    mx.eval([entry.state for entry in cache])
    mx.clear_cache()


def prefill_chunk(
    model: Callable[..., object],
    cache: Cache,
    tokens: Sequence[int],
    start: int,
    end: int,
    config: ModelConfig,
) -> None:
    """Put ``tokens[start:end]`` into ``cache``, which holds those before.

    Args:
        model: called as ``model(tokens, cache=cache)`` with tokens of shape (1, n).
    """
    with mx.stream(generation_stream):
        grow(cache, end - start)
        model(mx.array([tokens[start:end]]), cache=cache)
        settle(cache, config)


def prefilled(model: nn.Module, config: ModelConfig, prompt: Sequence[int]) -> Cache:
    """A new KV cache with all of a short prompt but the last token, for trials of a model.

    Raises:
        Interrupted: it should stop; asked before.
    """
    cache = make_kv_cache(model, config)
    checkpoint()
    if len(prompt) > 1:
        prefill_chunk(model, cache, prompt, 0, len(prompt) - 1, config)
    return cache


def may_pad(model: nn.Module, config: ModelConfig) -> bool:
    """Whether prompts of different lengths may be prefilled together.

    Recurrent models would have to mask the padding, and not all of them do.
    """
    cache = make_kv_cache(model, config)
    return all(isinstance(entry, KVCache | RotatingKVCache) for entry in cache)


def padded_prefill(model: nn.Module, cache: Cache, prompts: Sequence[Sequence[int]]) -> None:
    """Put prompts of different lengths into a batch cache in one forward, padded on the right."""
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    tokens = mx.array([[*p, *[0] * pad] for p, pad in zip(prompts, padding, strict=True)])
    with mx.stream(generation_stream):
        grow(cache, max(lengths))
        if any(padding):
            for entry in cache:
                entry.prepare(lengths=lengths, right_padding=padding)
        model(tokens, cache=cache)
        mx.eval([entry.state for entry in cache])
        if any(padding):
            for entry in cache:
                if entry.keys is not None:  # some models have layers that stay unused
                    entry.finalize()
        keep_windows(cache)
        keep_own_arrays(cache)
        mx.eval([entry.state for entry in cache])
        mx.clear_cache()
