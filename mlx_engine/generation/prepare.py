"""A request -> ready for its work: its prompt in tokens, its options looked at."""

from __future__ import annotations

import functools
from dataclasses import replace

from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.constraint import GrammarState
from mlx_engine.generation.reasoning_budget import ReasoningBudget, ReasoningClose
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampling import check_sampling, make_sampling
from mlx_engine.generation.text import TextAssembler
from mlx_engine.generation.tokenize import Encoded, encode
from mlx_engine.models.token_text import TokenTexts
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.requests import ChatPrompt, TextPrompt

_COMPLETED = (
    "the answer is empty: a plain prompt is completed as it stands, and this model knows chats: "
    'ask [{"role": "user", "content": prompt}]'
)


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
        if encoded.chat is not None:
            chat = encoded.chat.bind(params.constraint, vocabulary.special_tokens)
            encoded = replace(encoded, chat=chat)
        grammar = _grammar(request, vocabulary, encoded)
    request.prompt, request.places = encoded.tokens, encoded.places
    for note in encoded.notes:
        request.note(note)
    if params.constraint is not None and isinstance(source, ChatPrompt) and source.offered:
        request.note("tools: an answer with output= or constraint= has no calls")
    plain = isinstance(source, TextPrompt) and isinstance(source.prompt, str)
    if plain and vocabulary.tokenizer.has_chat_template:
        request.note_if_empty = _COMPLETED
    request.fit(vocabulary.context_length)
    check_sampling(params, vocabulary.vocab_size)
    stops = frozenset(params.stop_token_ids)
    request.prepared(
        TextAssembler(
            vocabulary.tokenizer,
            stop=tuple(params.stop),
            parser=encoded.parser(),
        ),
        functools.partial(
            make_sampling,
            params,
            vocab_size=vocabulary.vocab_size,
            xtc_special_tokens=(*vocabulary.newline_tokens, *sorted(vocabulary.eos)),
            budget=_budget(request, vocabulary, encoded),
            grammar=grammar,
            token_text=None if params.logprobs is None else TokenTexts(vocabulary.tokenizer),
        ),
        stops if params.ignore_eos and grammar is None else vocabulary.eos | stops,
    )


def _grammar(request: Request, vocabulary: Vocabulary, encoded: Encoded) -> GrammarState | None:
    """Where the answer is in what binds it; ``None`` if nothing does.

    Raises:
        InvalidRequest: that cannot be compiled.
        Interrupted: the request was cancelled meanwhile.
    """
    params, chat = request.asked.params, encoded.chat
    option = "tools" if params.constraint is None else "constraint"
    if chat is not None:
        lark = None if chat.bound is None else chat.bound.lark
    else:
        lark = None if params.constraint is None else f"start: {params.constraint.rule}"
    if lark is None:
        return None
    compiled = vocabulary.grammars.compile(lark, option)
    return GrammarState(compiled, request.tokens, goes_on=params.ignore_eos)


def _budget(request: Request, vocabulary: Vocabulary, encoded: Encoded) -> ReasoningBudget | None:
    """The budget of a request's reasoning; ``None`` if it has none, or there is no reasoning."""
    option, source, chat = "max_reasoning_tokens", request.asked.source, encoded.chat
    if chat is None or not isinstance(source, ChatPrompt) or source.max_reasoning_tokens is None:
        return None
    text = chat.reasoning_close()
    if not text:
        request.note(f"{option}: this model's template knows no reasoning")
        return None
    tokenizer = vocabulary.tokenizer
    close = ReasoningClose(tokenizer, text)
    if not close.tokens or max(close.tokens) >= vocabulary.vocab_size:
        raise InvalidRequest(option, f"this model has no tokens for {text!r}, which ends reasoning")
    limit = source.max_reasoning_tokens
    whole = chat.bound is not None  # a grammar is one of characters
    return ReasoningBudget(
        limit, close, tokenizer, chat.parser, request.tokens, whole_characters=whole
    )
