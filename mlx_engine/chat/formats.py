"""How families write reasoning and calls: a stand-in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a family writes reasoning and calls.

    Attributes:
        name: of the format.
        chosen_by: what it was chosen by.
        has_reasoning: whether reasoning is marked.
        has_calls: whether there are calls.
    """

    name: str
    chosen_by: str
    has_reasoning: bool
    has_calls: bool


def choose_format(
    template: str | Mapping[str, str] | Sequence[Any] | None,
    *,
    response_template: dict[str, Any] | None = None,
    tool_format: object = None,
    reasoning_format: object = None,
    special_tokens: Collection[str] = (),
) -> AnswerFormat:
    """The format that a chat template speaks of."""
    text = template if isinstance(template, str) else ""
    calls = "<tool_call>" in text if tool_format is None else tool_format != "none"
    reasons = "<think>" in text if reasoning_format is None else reasoning_format != "none"
    by = "option" if tool_format or reasoning_format else "template"
    name = tool_format if isinstance(tool_format, str) else "hermes" if calls else "none"
    return AnswerFormat(name, by if calls or reasons else "none", reasons, calls)
