"""Text that cannot fit into the context, refused before megabytes of it are tokenized."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import ContextLengthExceeded, InvalidRequest
from mlx_engine.models.vocabulary import Vocabulary

# Unicode normalisation in a tokenizer may shorten text, though never by more than this.
_SHRINK = 4
_TYPICAL = 8  # characters a token that hardly any real text exceeds
_SAMPLE = 2**12  # characters from each of three places by which tokens are estimated
_SLICE = 2**16  # characters tokenized between two looks whether to go on
_SEAM = 64  # tokens that a slice may have more than its part of the whole


def check_text(text: str, vocabulary: Vocabulary, option: str) -> None:
    """Refuse text that cannot fit, without tokenizing megabytes of it first, or is no text.

    Text that is long for its context is tokenized slice by slice until it is known not to fit;
    only what may fit is worth tokenizing whole.

    Raises:
        ContextLengthExceeded: it has more tokens than the context.
        InvalidRequest: it has surrogates, as bytes that are no UTF-8 become in arguments.
        Interrupted: it should stop.
    """
    limit = vocabulary.context_length
    if limit is not None and len(text) > _SHRINK * limit * vocabulary.longest_token:
        raise _too_long(f"{len(text)} characters of {option} cannot", limit, option)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(option, f"is not valid Unicode text ({error})") from error
    checkpoint()
    if limit is None or len(text) <= max(limit, _SLICE):
        return
    if len(text) <= _TYPICAL * limit and _estimate(text, vocabulary) <= limit:
        return
    at_least = done = 0
    for part in _slices(text):
        at_least += max(0, _count(part, vocabulary) - _SEAM)
        done += len(part)
        if at_least > limit:
            raise _too_long(
                f"the first {done} of {len(text)} characters of {option} have more than "
                f"{at_least} tokens, which cannot",
                limit,
                option,
            )
        checkpoint()


def _estimate(text: str, vocabulary: Vocabulary) -> float:
    """Tokens of a text, estimated by its beginning, middle and end."""
    places = (0, len(text) // 2, len(text) - _SAMPLE)
    found = sum(_count(text[place : place + _SAMPLE], vocabulary) for place in places)
    return found / (len(places) * _SAMPLE) * len(text)


def _count(text: str, vocabulary: Vocabulary) -> int:
    """Tokens of a text, without the special ones that are added at its ends."""
    return len(vocabulary.tokenizer.encode(text, add_special_tokens=False))


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _SLICE):
        yield text[start : start + _SLICE]


def _too_long(what: str, limit: int, option: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{what} fit into the model's context of {limit} tokens; shorten it",
        prompt_tokens=None,
        max_tokens=None,
        context_length=limit,
        option=option,
    )
