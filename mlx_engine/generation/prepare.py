"""A request -> ready for its work: its prompt in tokens, its options looked at."""

from __future__ import annotations

import functools

from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.generation.prompt import encode
from mlx_engine.generation.request import Request
from mlx_engine.generation.sampling import check_sampling, make_sampling
from mlx_engine.generation.text import TextAssembler
from mlx_engine.models.token_text import token_texts
from mlx_engine.models.vocabulary import Vocabulary


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
            parser=encoded.parser(),
        ),
        functools.partial(
            make_sampling,
            params,
            vocab_size=vocabulary.vocab_size,
            xtc_special_tokens=(*vocabulary.newline_tokens, *sorted(vocabulary.eos)),
            token_text=token_texts(vocabulary.tokenizer),
        ),
        stops if params.ignore_eos else vocabulary.eos | stops,
    )
