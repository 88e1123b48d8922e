"""Sampling parameters -> an mlx_lm sampler and logits processors. Nothing else makes either."""

from __future__ import annotations

import functools
import hashlib
import importlib
import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    make_logits_processors,
    make_sampler,
)

from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import TokenLogprob
from mlx_engine.params import LogitsProcessor, SamplingParams
from mlx_engine.turn import what_it_says

Sampler = Callable[[mx.array], mx.array]


class SamplerAt(Protocol):
    """Token ids of shape (n,) from log-probabilities of shape (n, vocabulary), for an answer's
    tokens from number ``position`` on.
    """

    def __call__(self, logprobs: mx.array, position: int, /) -> mx.array: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Sampling:
    """What turns logits into the next token: processors first, then the sampler.

    Attributes:
        sampler: token ids of shape (n,) from log-probabilities of shape (n, vocabulary).
        processors: functions of the tokens so far and logits of shape (1, vocabulary).
        sample_at: the same choice whenever it is asked for the same position, so that what a
            draft proposes can be what the model would choose.
    """

    sampler: Sampler
    processors: tuple[LogitsProcessor, ...]
    sample_at: SamplerAt

    def seek(self, position: int) -> None:
        """The next token that ``sampler`` is asked for is number ``position`` of the answer."""
        if isinstance(self.sampler, _SeededSampler):
            self.sampler.position = position


def make_sampling(
    params: SamplingParams, *, vocab_size: int, xtc_special_tokens: Sequence[int] = ()
) -> Sampling:
    """The sampler and processors of one request.

    Args:
        params: of the request.
        vocab_size: tokens that the model's logits cover.
        xtc_special_tokens: ids that XTC never excludes (newline and end of sequence, as in
            mlx-lm).

    Raises:
        InvalidRequest: a token id is outside of the vocabulary, or a logits processor cannot
            be imported.
    """
    for option, tokens in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token in tokens:
            if token >= vocab_size:
                raise InvalidRequest(
                    option, f"token id {token} is not in the vocabulary of {vocab_size} tokens"
                )
    processors: list[LogitsProcessor] = make_logits_processors(
        logit_bias=dict(params.logit_bias),
        # A factor of 1 changes nothing; mlx_lm would still compute it.
        repetition_penalty=None if params.repetition_penalty == 1 else params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    options: dict[str, Any] = {
        "temp": 0.0 if params.greedy else params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "top_k": params.top_k if params.top_k < vocab_size else 0,
        "xtc_special_tokens": tuple(xtc_special_tokens),
    }
    sampler = _shared_sampler(**options)
    sample_at: SamplerAt
    if params.greedy:
        sample_at = _Anywhere(sampler)
    elif params.seed is None:
        sample_at = _SeededSampler(secrets.randbits(64), **options)
    else:
        sampler = sample_at = _SeededSampler(params.seed, **options)
    own = [_imported(p) if isinstance(p, str) else p for p in params.logits_processors]
    return Sampling(sampler, (*processors, *own), sample_at)


def _imported(name: str) -> LogitsProcessor:
    """The logits processor of that name; a class gives a new one for each request."""
    module, _, path = name.partition(":")
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
        processor = found() if isinstance(found, type) else found
    except Exception as error:
        raise InvalidRequest(
            "logits_processors", f"{name!r} cannot be imported: {what_it_says(error)}"
        ) from error
    if not callable(processor):
        raise InvalidRequest("logits_processors", f"{name!r} is not a function")
    return cast("LogitsProcessor", processor)


@dataclass(frozen=True, slots=True)
class _Anywhere:
    """A sampler without chance."""

    sampler: Sampler

    def __call__(self, logprobs: mx.array, _: int, /) -> mx.array:
        return self.sampler(logprobs)


@functools.lru_cache(maxsize=64)
def _shared_sampler(*, xtc_special_tokens: tuple[int, ...], **options: Any) -> Sampler:
    """mlx_lm's sampler, the same object for the same options."""
    sampler: Sampler = make_sampler(xtc_special_tokens=list(xtc_special_tokens), **options)
    return sampler


class _SeededSampler:
    """mlx_lm's sampler with random numbers that depend on (seed, position) alone.

    mlx_lm draws from one global state, so that what else runs decides what a request gets.
    Here position n of a request always gets the same noise, whoever shares the process.

    Attributes:
        position: of the next token.
    """

    def __init__(
        self,
        seed: int,
        *,
        temp: float,
        top_p: float,
        min_p: float,
        xtc_probability: float,
        xtc_threshold: float,
        top_k: int,
        xtc_special_tokens: tuple[int, ...],
    ) -> None:
        self._seed = seed
        self.position = 0
        self._scale = 1.0 / temp
        self._top_p = top_p
        self._min_p = min_p
        self._xtc = (xtc_probability, xtc_threshold, list(xtc_special_tokens))
        self._top_k = top_k

    def __call__(self, logprobs: mx.array, position: int | None = None, /) -> mx.array:
        """Token ids of shape (n,) from log-probabilities of shape (n, vocabulary).

        Args:
            position: of the first one; ``None`` is the one after the latest.
        """
        if position is not None:
            self.position = position
        rows = range(logprobs.shape[0])
        tokens = [self._sample(logprobs[i : i + 1], self.position + i) for i in rows]
        self.position += len(tokens)
        return tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)

    def _sample(self, logprobs: mx.array, position: int) -> mx.array:
        key = _key(self._seed, position)
        # The order of the filters is mlx_lm's.
        if self._top_p < 1:
            logprobs = apply_top_p(logprobs, self._top_p)
        if self._min_p > 0:
            logprobs = apply_min_p(logprobs, self._min_p)
        probability, threshold, special = self._xtc
        if probability > 0:
            key, coin = mx.random.split(key)
            # Always applied by mlx_lm at 1.0; whether it counts is our own throw.
            without_top = apply_xtc(logprobs, 1.0, threshold, special)
            thrown = mx.random.uniform(key=coin) < probability
            logprobs = mx.where(thrown, without_top, logprobs)
        if self._top_k > 0:
            logprobs = apply_top_k(logprobs, self._top_k)
        return mx.random.categorical(logprobs * self._scale, key=key)


def _key(seed: int, position: int) -> mx.array:
    """A PRNG key for this seed and position; hashed, so that seeds 1 and 2 share none."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return mx.random.key(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


def token_logprob(token: int, logprobs: mx.array, top: int) -> TokenLogprob:
    """The log-probability of ``token``, and the ``top`` best, from a (vocabulary,) vector."""
    best: list[tuple[int, float]] = []
    if top > 0:
        top = min(top, logprobs.shape[-1])
        ids = mx.argpartition(-logprobs, kth=top - 1)[:top]
        values = logprobs[ids]
        mx.eval(ids, values)
        found: list[tuple[int, float]] = list(zip(ids.tolist(), values.tolist(), strict=True))  # type: ignore[arg-type]
        best = sorted(found, key=lambda pair: -pair[1])
    return TokenLogprob(token, float(cast("float", logprobs[token].item())), tuple(best))
