"""Tokens from log-probabilities: all rows of a batch at once, whatever the options of each.

Options go in as data, one value a row. mlx_lm's own samplers are compiled with them as
constants, so that each value that is new to the process is another program to be compiled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

_LEAST_TOP_P = 1e-30  # float32 would round a smaller one to 0, which would leave no token
_COLD = 1e-3  # temperatures below it make numbers of log-probabilities that float16 has not
_BELOW_ONE = 1 - 2**-24  # float32's number next to 1
_NO_KEY = [0, 0]  # of a row without a seed, whose number is not used


@dataclass(frozen=True, slots=True)
class SamplerOptions:
    """How one row is sampled.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: nucleus; 1 is off.
        min_p: least probability, as a share of the largest; 0 is off.
        xtc_probability: of leaving out all likely tokens but the last of them; 0 is off.
        xtc_threshold: from which on a token is a likely one.
        xtc_special_tokens: ids that XTC never leaves out.
        top_k: how many of the likeliest tokens may be chosen; 0 is off.
        seed: the random numbers depend on it and the position alone; ``None`` draws from MLX's
            global state.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    top_k: int = 0
    seed: int | None = None

    @property
    def filters(self) -> tuple[object, ...]:
        """The key of rows that go through the same computations; ``()`` is greedy."""
        if self.temperature == 0:
            return ()
        xtc = self.xtc_special_tokens if self.xtc_probability > 0 else None
        return self.temperature < _COLD, self.top_p < 1, self.min_p > 0, xtc, self.top_k > 0


class Sampler:
    """A sampler of all rows of a batch at once.

    Rows that use the same filters are one group, so that no row pays for what only others use;
    there are few of them, whatever values the options have.

    Args:
        options: of each row; those of one alone are for any number of rows.
    """

    def __init__(self, options: Sequence[SamplerOptions]) -> None:
        places: dict[tuple[object, ...], list[int]] = {}
        for i, each in enumerate(options):
            places.setdefault(each.filters, []).append(i)
        self._places = list(places.values())
        self._groups = [_Group([options[i] for i in group]) for group in self._places]
        self._rows: list[mx.array] = []
        if len(self._groups) > 1:
            order = [i for group in self._places for i in group]
            self._rows = [mx.array(group) for group in self._places]
            self._back = mx.array(sorted(range(len(order)), key=order.__getitem__))

    def __call__(self, logprobs: mx.array, positions: Sequence[int]) -> mx.array:
        """Token ids of shape (rows,), uint32, from log-probabilities of shape (rows, vocabulary).

        Whatever is in ``logprobs``, they are ids of the vocabulary.

        Args:
            positions: of the tokens in the answer, one a row, counted from 0.
        """
        if not self._rows:
            return self._groups[0](logprobs, positions)
        parts = [
            group(logprobs[rows], [positions[i] for i in places])
            for group, rows, places in zip(self._groups, self._rows, self._places, strict=True)
        ]
        return mx.concatenate(parts)[self._back]


def can_be_sampled(logprobs: mx.array, tokens: mx.array) -> mx.array:
    """Whether each row had anything to choose from, of shape (rows,), bool.

    Log-probabilities are all NaN, or infinite, where one of the logits is NaN or infinite, or
    where all of them are excluded.

    Args:
        tokens: chosen from ``logprobs``.
    """
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)
    return chosen[:, 0] > -mx.inf


class _Group:
    """Rows that use the same filters, in mlx_lm's order: top-p, min-p, XTC, top-k."""

    def __init__(self, options: Sequence[SamplerOptions]) -> None:
        first = options[0]
        self._greedy = first.temperature == 0
        if self._greedy:
            return
        self._cold = first.temperature < _COLD
        self._seeds = [each.seed for each in options]
        self._seeded = mx.array([[seed is not None] for seed in self._seeds])
        self._scale = mx.array([[1.0 / each.temperature] for each in options])
        self._top_p = self._min_p = self._xtc = self._spared = None
        self._top_k: list[int] = []
        if first.top_p < 1:
            self._top_p = mx.array([[max(each.top_p, _LEAST_TOP_P)] for each in options])
        if first.min_p > 0:
            self._min_p = mx.array([[math.log(each.min_p)] for each in options])
        if first.xtc_probability > 0:
            self._xtc = (
                mx.array([[each.xtc_probability] for each in options]),
                mx.array([[each.xtc_threshold] for each in options]),
            )
            self._spared = mx.array(first.xtc_special_tokens, dtype=mx.uint32)
        if first.top_k > 0:
            self._top_k = [each.top_k for each in options]
            self._ranks = mx.array([[k] for k in self._top_k])

    def __call__(self, logprobs: mx.array, positions: Sequence[int]) -> mx.array:
        if self._greedy:
            return mx.argmax(logprobs, axis=-1)
        coin, number = self._draw(positions)
        if self._cold and logprobs.dtype == mx.float16:
            logprobs = logprobs.astype(mx.float32)
        if self._top_p is not None:
            logprobs = _nucleus(logprobs, self._top_p)
        if self._min_p is not None:
            least = mx.max(logprobs, axis=-1, keepdims=True) + self._min_p.astype(logprobs.dtype)
            logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
        if coin is not None:
            logprobs = self._without_top(logprobs, coin)
        if self._top_k:
            logprobs = self._best(logprobs)
        logits = logprobs * self._scale.astype(logprobs.dtype)
        if number is None:
            return mx.random.categorical(logits)
        return _categorical(logits, number)

    def _draw(self, positions: Sequence[int]) -> tuple[mx.array | None, mx.array | None]:
        """Random numbers in [0, 1) of shape (rows, 1): XTC's, if it is used, and the token's.

        ``None`` for the token's where several rows draw from the global state: MLX does that in
        one go, by a number for each token, which costs less.
        """
        shape = (len(positions), 1)
        coin: mx.array | None = None
        seeds = self._seeds * len(positions) if len(self._seeds) == 1 else self._seeds
        if all(seed is None for seed in seeds):
            if self._xtc is not None:
                coin = mx.random.uniform(shape=shape)
            several = len(positions) > 1
            return coin, None if several else mx.random.uniform(shape=shape)
        keys = mx.array(
            [
                _NO_KEY if seed is None else _key(seed, position)
                for seed, position in zip(seeds, positions, strict=True)
            ],
            dtype=mx.uint32,
        )
        if self._xtc is not None:
            halves = mx.vmap(mx.random.split)(keys)
            keys = halves[:, 0]
            coin = self._own(_uniform(halves[:, 1]), seeds)
        return coin, self._own(_uniform(keys), seeds)

    def _own(self, drawn: mx.array, seeds: Sequence[int | None]) -> mx.array:
        """Numbers of the seeded rows; the others' come from the global state."""
        if None not in seeds:
            return drawn
        return mx.where(self._seeded, drawn, mx.random.uniform(shape=drawn.shape))

    def _without_top(self, logprobs: mx.array, coin: mx.array) -> mx.array:
        """XTC: where the coin says so, without all likely tokens but the last of them."""
        assert self._xtc is not None
        probability, threshold = self._xtc
        probs = mx.softmax(logprobs, axis=-1)
        likely = mx.where(probs > threshold.astype(probs.dtype), probs, mx.inf)
        out = (probs > likely.min(axis=-1, keepdims=True)) & (coin < probability)
        if self._spared is not None and self._spared.size:
            out[..., self._spared] = False
        return mx.where(out, -mx.inf, logprobs)

    def _best(self, logprobs: mx.array) -> mx.array:
        """Top-k; of equal ones at the end, the first ones."""
        most = max(self._top_k)
        best = mx.partition(-logprobs, kth=most - 1, axis=-1)[..., :most]
        if len(set(self._top_k)) == 1:
            worst = -best[..., -1:]
        else:
            worst = -mx.take_along_axis(mx.sort(best, axis=-1), self._ranks - 1, axis=-1)
        better, equal = logprobs > worst, logprobs == worst
        room = self._ranks - better.sum(axis=-1, keepdims=True)
        kept = better | (equal & (mx.cumsum(equal, axis=-1) <= room))
        return mx.where(kept, logprobs, -mx.inf)


def _nucleus(logprobs: mx.array, top_p: mx.array) -> mx.array:
    """The likeliest tokens whose probabilities add up to ``top_p``, of shape (rows, 1)."""
    ranked = mx.sort(logprobs, axis=-1)
    probs = mx.exp(ranked.astype(mx.float32))
    above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = above[..., :1] + probs[..., :1]
    dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    return mx.where(logprobs < mx.take_along_axis(ranked, dropped, axis=-1), -mx.inf, logprobs)


def _categorical(logits: mx.array, number: mx.array) -> mx.array:
    """Token ids by the inverse of the distribution function, which takes one number a row.

    That is what ``mx.random.categorical`` does for a single row; for several of them it draws
    a number for each token.

    Args:
        logits: of shape (rows, vocabulary), those of excluded tokens -inf.
        number: in [0, 1), of shape (rows, 1).
    """
    logits = logits.astype(mx.float32)
    weights = mx.exp(logits - mx.max(logits, axis=-1, keepdims=True))
    reached = mx.cumsum(weights, axis=-1)
    # The two sums round differently: the end is never passed, for the tokens behind the last
    # weight are excluded.
    goal = mx.minimum(number * weights.sum(axis=-1, keepdims=True), reached[..., -1:] * _BELOW_ONE)
    return (reached <= goal).sum(axis=-1).astype(mx.uint32)


def _key(seed: int, position: int) -> list[int]:
    """A PRNG key for this seed and position; hashed, so that seeds 1 and 2 share none."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return [digest >> 32, digest & 0xFFFFFFFF]


def _uniform(keys: mx.array) -> mx.array:
    """A number in [0, 1) from each key, of shape (keys, 1)."""
    drawn: mx.array = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)
    return drawn
