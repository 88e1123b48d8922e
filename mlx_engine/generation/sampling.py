"""Sampling parameters -> how a row is sampled, and logits processors. Nothing else makes either."""

from __future__ import annotations

import contextvars
import importlib
import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from mlx_engine.core.work import call_in
from mlx_engine.errors import InvalidRequest, describe
from mlx_engine.generation.constraint import GrammarState
from mlx_engine.generation.reasoning_budget import ReasoningBudget
from mlx_engine.generation.sampler import Sampler, SamplerOptions
from mlx_engine.outputs import TokenLogprob
from mlx_engine.params import LogitsProcessor, SamplingParams

TokenText = Callable[[int], tuple[str, bytes]]


def _no_text(token: int) -> tuple[str, bytes]:
    return "", b""


class Sampling:
    """Logits to the next token: processors first, then what reasoning is bound to, then what the
    answer is, then the sampler.

    Attributes:
        options: how it is sampled, alone or as a row among others.
        processors: functions of the tokens so far and logits of shape (1, vocabulary).
        budget: of its reasoning; ``None`` is without limit.
        grammar: where its answer is in its grammar; ``None`` if it has none.

    Args:
        options, processors, budget, grammar: the same.
        token_text: gives the text of a token, and its bytes.
    """

    def __init__(
        self,
        options: SamplerOptions,
        processors: Sequence[LogitsProcessor] = (),
        budget: ReasoningBudget | None = None,
        grammar: GrammarState | None = None,
        token_text: TokenText = _no_text,
    ) -> None:
        self.options = options
        self.processors = tuple(processors)
        self.budget = budget
        self.grammar = grammar
        self._token_text = token_text

    def sample(self, logprobs: mx.array, position: int) -> mx.array:
        """Token ids of shape (n,) from log-probabilities of shape (n, vocabulary), for an
        answer's tokens from number ``position`` on.
        """
        return self._sampler(logprobs, range(position, position + logprobs.shape[0]))

    def sample_at(self, logprobs: mx.array, position: int) -> mx.array:
        """Token ids as of ``sample``, the same whenever it is asked for the same position, so that
        what a draft proposes can be what the model would choose.
        """
        return self._repeatable(logprobs, range(position, position + logprobs.shape[0]))

    def process(
        self, tokens: mx.array, logits: mx.array, context: contextvars.Context | None
    ) -> mx.array:
        """Logits of shape (1, vocabulary) after the processors.

        Args:
            tokens: of shape (n,), uint32: all that the logits follow.
            context: the context variables that processors of the caller's see.

        Raises:
            Exception: whatever a processor raises.
        """
        processed = logits
        for processor in self.processors:
            if context is None:
                processed = processor(tokens, processed)
            else:
                processed = call_in(context, processor, tokens, processed)
        if not isinstance(processed, mx.array) or processed.shape != logits.shape:
            got = getattr(processed, "shape", type(processed).__name__)
            raise ValueError(
                f"a logits processor must return an mx.array of shape {logits.shape}, not {got}"
            )
        return processed.astype(logits.dtype)

    def process_now(
        self, tokens: mx.array, logits: mx.array, context: contextvars.Context
    ) -> tuple[mx.array, bool]:
        """The same, evaluated; and whether there is a token left to sample, if there was one."""
        processed = self.process(tokens, logits, context)
        before, after = (mx.isfinite(mx.logsumexp(each)) for each in (logits, processed))
        mx.eval(processed, before, after)
        return processed, not before.item() or bool(after.item())

    def logprob(self, token: int, logprobs: mx.array, top: int) -> TokenLogprob:
        """The log-probability of ``token``, and the ``top`` best, from a (vocabulary,) vector."""
        return token_logprob(token, logprobs, top, self._token_text)

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler([self.options])

    @cached_property
    def _repeatable(self) -> Sampler:
        if self.options.seed is not None or self.options.temperature == 0:
            return self._sampler
        return Sampler([replace(self.options, seed=secrets.randbits(64))])


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that do not suit the model. From any thread; no MLX work.

    Args:
        vocab_size: tokens that the model's logits cover.

    Raises:
        InvalidRequest: a token id is outside of the vocabulary.
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


def make_sampling(
    params: SamplingParams,
    *,
    vocab_size: int,
    xtc_special_tokens: Sequence[int] = (),
    budget: ReasoningBudget | None = None,
    grammar: GrammarState | None = None,
    token_text: TokenText | None = None,
) -> Sampling:
    """The sampler's options and the processors of one request. On the MLX thread.

    Args:
        params: of the request, for which ``check_sampling`` was asked.
        vocab_size: tokens that the model's logits cover.
        xtc_special_tokens: ids that XTC never excludes (newline and end of sequence, as in
            mlx-lm).
        budget: of its reasoning.
        grammar: of its answer.
        token_text: gives the text and the bytes of a token, for log-probabilities.

    Raises:
        InvalidRequest: a logits processor cannot be imported.
    """
    processors: list[LogitsProcessor] = make_logits_processors(
        logit_bias=dict(params.logit_bias),
        # A factor of 1 changes nothing; mlx_lm would still compute it.
        repetition_penalty=None if params.repetition_penalty == 1 else params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
    )
    options = SamplerOptions(
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
        xtc_special_tokens=tuple(xtc_special_tokens),
        top_k=params.top_k if params.top_k < vocab_size else 0,
        seed=params.seed,
    )
    own = [_made(p) if isinstance(p, str) else p for p in params.logits_processors]
    return Sampling(options, (*processors, *own), budget, grammar, token_text or _no_text)


def _made(name: str) -> LogitsProcessor:
    """The logits processor of that name; a class gives a new one for each request.

    Its module may use MLX as soon as it is imported.
    """
    module, _, path = name.partition(":")
    try:
        found = operator.attrgetter(path)(importlib.import_module(module))
        processor = found() if isinstance(found, type) else found
    except Exception as error:
        raise InvalidRequest(
            "logits_processors", f"{name!r} cannot be imported: {describe(error)}"
        ) from error
    if not callable(processor):
        raise InvalidRequest("logits_processors", f"{name!r} is not a function")
    return cast("LogitsProcessor", processor)


def token_logprob(
    token: int, logprobs: mx.array, top: int, token_text: TokenText = _no_text
) -> TokenLogprob:
    """The log-probability of ``token``, and the ``top`` best, from a (vocabulary,) vector."""
    best: list[tuple[int, float]] = []
    if top > 0:
        top = min(top, logprobs.shape[-1])
        ids = mx.argpartition(-logprobs, kth=top - 1)[:top]
        values = logprobs[ids]
        mx.eval(ids, values)
        found: list[tuple[int, float]] = list(zip(ids.tolist(), values.tolist(), strict=True))  # type: ignore[arg-type]
        best = sorted(found, key=lambda pair: -pair[1])
    others = tuple(TokenLogprob(each, value, (), *token_text(each)) for each, value in best)
    own = float(cast("float", logprobs[token].item()))
    return TokenLogprob(token, own, others, *token_text(token))
