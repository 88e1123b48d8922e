"""Questions about prompts -> their answers; no MLX, on any thread."""

from __future__ import annotations

from dataclasses import replace

from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import ContextLengthExceeded
from mlx_engine.generation.cache.stored_prompt import PromptIndex
from mlx_engine.generation.tokenize import Encoded, encode
from mlx_engine.models.detokenizer import make_detokenizer
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.requests import ChatPrompt, TextPrompt

_ROOM = 4  # contexts that a prompt may be long: whoever counts wants to know by how much
_SOME = 4096  # tokens decoded between two looks whether to go on


def answer_question(
    question: PromptQuestion, vocabulary: Vocabulary, stored: PromptIndex
) -> PromptFacts:
    """The answer to a question.

    Args:
        stored: the prompts in the prompt cache.

    Raises:
        InvalidRequest: the prompt does not suit this model.
        ContextLengthExceeded: it is several times longer than the context.
        Interrupted: it should stop, and did between two steps.
    """
    source = question.source
    if question.subject == "decode":
        return PromptFacts(text=_decode(source, vocabulary))
    encoded = _encode(source, vocabulary)
    match question.subject:
        case "count_tokens":
            return PromptFacts(count=len(encoded.tokens))
        case "encode":
            return PromptFacts(tokens=tuple(encoded.tokens))
    checkpoint()
    return PromptFacts(
        count=len(encoded.tokens),
        text=encoded.text,
        tokens=tuple(encoded.tokens),
        cached_tokens=stored.cached(encoded.tokens),
        notes=encoded.notes,
    )


def _encode(source: TextPrompt | ChatPrompt, vocabulary: Vocabulary) -> Encoded:
    context = vocabulary.context_length
    if context is None:
        return encode(source, vocabulary)
    # Where turns end is of no interest here, and takes another rendering to find.
    wide = replace(vocabulary, context_length=_ROOM * context, cuttable=True)
    try:
        return encode(source, wide)
    except ContextLengthExceeded as error:
        raise ContextLengthExceeded(
            f"more than {_ROOM} times as long as the model's context of {context} tokens, so "
            "that it is not counted; shorten it",
            prompt_tokens=None,
            max_tokens=None,
            context_length=context,
            option=error.option,
        ) from None


def _decode(source: TextPrompt | ChatPrompt, vocabulary: Vocabulary) -> str:
    tokens = encode(source, vocabulary).tokens  # which are known to be token ids of this model
    detokenizer = make_detokenizer(vocabulary.tokenizer)
    parts: list[str] = []
    for number, token in enumerate(tokens):
        if number % _SOME == 0:
            checkpoint()
        parts.append(detokenizer.add(token))
    return "".join(parts) + detokenizer.finish()
