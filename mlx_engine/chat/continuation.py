"""A last message of the assistant that is left open, for the model to go on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_engine.chat.renderer import Messages

_MARK = "ContinuedHere"


def continued(
    messages: Messages, fields: tuple[str, ...], render: Callable[[Messages], str]
) -> str:
    """The prompt up to where the last message's text ends, to the letter.

    Words around that text keep white space that a template would strip, and say where it is.

    Args:
        messages: as the template takes them; the last one is the assistant's.
        fields: under which the template reads reasoning.
        render: puts messages into the template, without a generation prompt.

    Raises:
        ValueError: the template does not show the text.
        Exception: whatever ``render`` raises.
    """
    last = messages[-1]
    open_reasoning = not last["content"] and any(last.get(name) for name in fields)
    names = tuple(name for name in fields if name in last) if open_reasoning else ("content",)
    text = str(last[names[0]])
    begin, end = _marks(text)
    held = text[:1].isspace()  # only then is there something to hold at the beginning
    marked: dict[str, Any] = {**last, **dict.fromkeys(names, f"{begin if held else ''}{text}{end}")}
    rendered = render([*messages[:-1], marked])
    at = rendered.rfind(end)
    if at < 0:
        raise ValueError("it does not show the last message")
    prompt = rendered[:at]
    if not held:
        return prompt
    start = prompt.rfind(begin)
    return prompt if start < 0 else prompt[:start] + prompt[start + len(begin) :]


def _marks(text: str) -> tuple[str, str]:
    """Words that are not in the text."""
    mark = _MARK
    while mark in text:
        mark += "X"
    return f"Begins{mark}", f"Ends{mark}"
