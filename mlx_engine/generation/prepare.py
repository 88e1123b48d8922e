"""A request -> ready for its work: its prompt in tokens, its options looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.prompt import Encoded, encode
from mlx_engine.generation.reasoning_budget import (
    ReasoningBudget,
    ReasoningClose,
    ReasoningReader,
)
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampling import check_sampling, make_sampling
from mlx_engine.generation.text import TextAssembler
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.requests import ChatPrompt


def prepare(request: Request, vocabulary: Vocabulary) -> None:
    """Make the prompt of a request into tokens, and check its options; no MLX, on any thread.

    Raises:
        InvalidRequest: the prompt or an option does not suit this model.
        Interrupted: it was cancelled.
        Exception: whatever a tokenizer or chat template raises.
    """
    source, params = request.asked.source, request.asked.params
    with stoppable(lambda: request.should_stop):
        checkpoint()
        encoded = encode(source, vocabulary)
    request.prompt, request.places = encoded.tokens, encoded.places
    for note in encoded.notes:
        request.note(note)
    request.fit(vocabulary.context_length)
    check_sampling(params, vocabulary.vocab_size)
    stops = frozenset(params.stop_token_ids)
    request.prepared(
        TextAssembler(
            vocabulary.tokenizer,
            stop=tuple(params.stop),
            initial_state=encoded.initial_state,
            tools=source.tools if isinstance(source, ChatPrompt) else None,
        ),
        functools.partial(
            make_sampling,
            params,
            vocab_size=vocabulary.vocab_size,
            xtc_special_tokens=(*vocabulary.newline_tokens, *sorted(vocabulary.eos)),
            budget=_budget(request, vocabulary, encoded),
        ),
        stops if params.ignore_eos else vocabulary.eos | stops,
    )


def _budget(request: Request, vocabulary: Vocabulary, encoded: Encoded) -> ReasoningBudget | None:
    """The budget of a request's reasoning; ``None`` if it has none, or there is no reasoning."""
    option, source = "max_reasoning_tokens", request.asked.source
    if not isinstance(source, ChatPrompt) or source.max_reasoning_tokens is None:
        return None
    tokenizer = vocabulary.tokenizer
    found = _reasoning(encoded, tokenizer)
    if found is None:
        request.note(f"{option}: this model's template knows no reasoning")
        return None
    text, make_reader = found
    close = ReasoningClose(tokenizer, text)
    if not close.tokens or max(close.tokens) >= vocabulary.vocab_size:
        raise InvalidRequest(option, f"this model has no tokens for {text!r}, which ends reasoning")
    limit = source.max_reasoning_tokens
    return ReasoningBudget(limit, close, tokenizer, make_reader, request.tokens)


def _reasoning(
    encoded: Encoded, tokenizer: TokenizerWrapper
) -> tuple[str, Callable[[], ReasoningReader]] | None:
    """What closes reasoning, and what reads it; ``None`` if there is none."""
    if not tokenizer.has_thinking:
        return None
    start, end = tokenizer.think_start, tokenizer.think_end
    is_open = encoded.initial_state == "reasoning"
    return f"\n{end}\n\n", lambda: _Markers(start, end, is_open)


class _Markers:
    """Reasoning that is between two markers, once, at the beginning of an answer."""

    def __init__(self, start: str, end: str, is_open: bool) -> None:
        self._start, self._end, self._text = start, end, ""
        self.in_reasoning, self.reasoning_over = is_open, False

    def feed(self, text: str) -> None:
        if self.reasoning_over:
            return
        self._text += text
        if not self.in_reasoning:
            begun = self._text.lstrip()
            self.in_reasoning = begun.startswith(self._start)
            self.reasoning_over = not (self.in_reasoning or self._start.startswith(begun))
        if self.in_reasoning and self._end in self._text:
            self.in_reasoning, self.reasoning_over = False, True
