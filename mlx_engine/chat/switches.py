"""Thinking or not: the variable by which a chat template is told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_engine.errors import InvalidRequest

Render = Callable[[Mapping[str, Any]], str | None]  # a tiny conversation, with these variables


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable that switches reasoning.

    Attributes:
        name: of the variable.
        on, off: its values; texts among them are ones that the template itself has.
    """

    name: str
    on: object
    off: object


# By likelihood: a template that reads two of them means the first.
SWITCHES = (
    Switch("enable_thinking", True, False),
    Switch("thinking", True, False),
    Switch("enable_reasoning", True, False),
    Switch("reasoning", True, False),
    Switch("thinking_mode", "thinking", "chat"),
    Switch("thinking_mode", "enabled", "disabled"),
    Switch("thinking_mode", "on", "off"),
    Switch("thinking_option", "on", "off"),
    Switch("reasoning_effort", "high", "none"),
    Switch("thinking_budget", -1, 0),
)


def switch_thinking(
    thinking: bool | None,
    names: Collection[str],
    source: str,
    given: Mapping[str, Any],
    reasons: bool,
    render: Render,
) -> tuple[dict[str, Any], str | None]:
    """The variables for ``thinking``, and a note if it cannot be had.

    Args:
        thinking: ``None`` is the template's own default, which no variable stands for.
        names: of variables that the template reads.
        source: its text; empty for a function.
        given: the caller's own variables, which go first.
        reasons: whether the model's family reasons.
        render: to see whether a variable has an effect.

    Raises:
        InvalidRequest: the model does not reason.
    """
    if thinking is None:
        return {}, None
    for switch in SWITCHES:
        if switch.name not in names or not _has(source, switch):
            continue
        if switch.name in given:
            return {}, None
        on, off = (render({**given, switch.name: value}) for value in (switch.on, switch.off))
        if on != off:
            return {switch.name: switch.on if thinking else switch.off}, None
    if thinking and not reasons:
        raise InvalidRequest(
            "thinking", "this model's chat template has no reasoning to switch on; leave it out"
        )
    if not thinking and reasons:
        return _least_effort(names, given)
    return {}, None


def _least_effort(
    names: Collection[str], given: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    note = "thinking: this model's chat template cannot switch reasoning off"
    if "reasoning_effort" in names and "reasoning_effort" not in given:
        return {"reasoning_effort": "low"}, f"{note}; its reasoning_effort is 'low'"
    return {}, note


def _has(source: str, switch: Switch) -> bool:
    texts = [value for value in (switch.on, switch.off) if isinstance(value, str)]
    return not source or all(f"'{text}'" in source or f'"{text}"' in source for text in texts)
