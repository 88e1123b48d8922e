"""A request -> ready for its work: its prompt in tokens, its options looked at."""

from __future__ import annotations

import functools

from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.errors import ContextLengthExceeded
from mlx_engine.generation.prompt import encode, option_of
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampling import check_sampling, make_sampling
from mlx_engine.generation.text import TextAssembler
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.requests import ChatPrompt


def prepare(request: Request, vocabulary: Vocabulary) -> None:
    """Turn the prompt of a request into tokens, and look at its options. On any thread, without
    MLX work.

    Raises:
        InvalidRequest: the prompt or an option does not suit this model.
        Interrupted: it was cancelled.
        Exception: whatever a tokenizer or chat template raises.
    """
    source, params = request.source, request.params
    with stoppable(lambda: request.should_stop):
        checkpoint()
        encoded = encode(source, vocabulary)
    request.prompt, request.places = encoded.tokens, encoded.places
    for note in encoded.notes:
        request.note(note)
    request.limit = _fit(request, vocabulary)
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
        ),
        stops if params.ignore_eos else vocabulary.eos | stops,
    )


def _fit(request: Request, vocabulary: Vocabulary) -> int | None:
    """How many tokens may be generated; ``None`` is without limit."""
    context, wanted = vocabulary.context_length, request.params.max_tokens
    length = len(request.prompt)
    if context is None:
        return wanted
    room = context - length
    if room < (1 if wanted is None else wanted):
        advice = "shorten the prompt"
        if wanted is not None and room > 0:
            advice += f", or lower max_tokens to {room} or None (as many as fit)"
        raise ContextLengthExceeded(
            f"{length} prompt tokens and max_tokens={wanted} do not fit into the "
            f"model's context of {context} tokens (the engine's context_length); {advice}",
            prompt_tokens=length,
            max_tokens=wanted,
            context_length=context,
            option=option_of(request.source),
        )
    return room if wanted is None else wanted
