"""Scripted answers held against the constraint of the request."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from llguidance import LLMatcher, LLTokenizer

from mlx_engine.checks import shown
from mlx_engine.constraints import Constraint
from mlx_engine.errors import InvalidRequest

_AROUND = 20  # characters that an error shows on either side of the place


def check_bound(constraint: Constraint, pieces: Iterable[object], complete: bool) -> None:
    """See that a model could have given this answer under a constraint.

    Args:
        pieces: the content; up to an exception among them it was made.
        complete: whether it is a whole answer, if there is no exception.

    Raises:
        InvalidRequest: the constraint cannot be followed.
        ValueError: the answer breaks it: a mistake of the script.
    """
    parts = list[str]()
    for piece in pieces:
        if isinstance(piece, Exception):
            complete = False
            break
        if isinstance(piece, str):
            parts.append(piece)
    text = "".join(parts)
    matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_lark(f"start: {constraint.rule}"))
    if matcher.is_error():
        raise InvalidRequest("constraint", matcher.get_error())
    encoded = text.encode()
    if (taken := matcher.try_consume_tokens(list(encoded))) < len(encoded):
        at = len(encoded[:taken].decode(errors="ignore"))
        before, after = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
        raise ValueError(
            f"the scripted answer breaks the constraint of the request at character {at}: "
            f"{after!r} cannot follow {before!r}; the constraint is {shown(constraint)}"
        )
    if complete and not matcher.is_accepting():
        raise ValueError(
            f"the scripted answer ends with {text[-_AROUND:]!r}, where the constraint of the "
            "request wants more; FakeAnswer(..., finish_reason='length') is one that is cut; the "
            f"constraint is {shown(constraint)}"
        )


@functools.cache
def _bytes() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    return LLTokenizer("byte")
