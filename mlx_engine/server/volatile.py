"""Text that agents put in front of their prompts, and that is another one each time.

A prompt is in the prompt cache as far as it begins like an earlier one, so that a number in its
first line costs all of it. What is in the table is taken out of messages that instruct.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FRONT = 16_384  # characters of a message that are looked at
_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Volatile:
    """A kind of such text.

    Attributes:
        what: in words.
        pattern: finds it.
        steady: takes its place, as in ``re.sub``.
    """

    what: str
    pattern: re.Pattern[str]
    steady: str = ""


VOLATILE: tuple[Volatile, ...] = (
    Volatile(
        "the line for billing of claude-code, with a number that each session has anew",
        re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*"),
    ),
    Volatile(
        "the time of day, in a line that tells the date; the date stays",
        re.compile(
            r"(?im)(\b(?:current|now|today)\b[^\n]{0,40}?\b\d{4}-\d\d-\d\d)[T ]"
            r"\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?\b"
        ),
        r"\1",
    ),
)


def steady(messages: Sequence[Any]) -> list[Any]:
    """Messages as a client has sent them, without what is volatile in them."""
    return [_steady(message) for message in messages]


def _steady(message: Any) -> Any:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        return message
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _without(content)}
    if isinstance(content, list):
        return {**message, "content": [_part(part) for part in content]}
    return message


def _part(part: Any) -> Any:
    if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
        return {**part, "text": _without(text)}
    return part


def _without(text: str) -> str:
    front = text[:_FRONT]
    for each in VOLATILE:
        front = each.pattern.sub(each.steady, front)
    return front + text[_FRONT:]
