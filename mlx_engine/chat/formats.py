"""The format of a model's answers, chosen by its chat template or by an option."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mlx_engine.chat.answer_format import AnswerFormat, ReasoningFormat, ToolFormat
from mlx_engine.chat.families import FAMILIES, REASONING, Family
from mlx_engine.chat.response_template import format_of
from mlx_engine.errors import InvalidRequest

__all__ = ["AnswerFormat", "ReasoningFormat", "ToolFormat", "choose_format"]

_BY_NAME = {family.name: family for family in FAMILIES}
_SHOWN = 64  # characters of a name that is not known


def choose_format(
    template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None,
    *,
    response_template: dict[str, Any] | None = None,
    tool_format: object = None,
    reasoning_format: object = None,
    special_tokens: Collection[str] = (),
) -> AnswerFormat:
    """The format in which a model writes its answers.

    Args:
        template: its chat template, or several by their names; of those the one for tools counts.
        response_template: the model's own description of its answers, which goes first.
        tool_format: a name of the table, ``"none"`` or a ``ToolFormat``, in its place.
        reasoning_format: a name of the table, ``"none"`` or a ``ReasoningFormat``.
        special_tokens: of the tokenizer, where the template does not tell.

    Raises:
        InvalidRequest: an option names no format.
    """
    if response_template and tool_format is None and reasoning_format is None:
        described = format_of(response_template)
        if described is not None:
            shown = _by_template(template_text(template), frozenset(special_tokens))
            return replace(described, bound_as=shown if shown.calls else None)
    found = _by_template(template_text(template), frozenset(special_tokens))
    if tool_format is not None:
        found = _with_calls(found, tool_format)
    if reasoning_format is not None:
        found = _with_reasoning(found, reasoning_format)
    return found


def template_text(template: str | Mapping[str, str] | Sequence[Any] | None) -> str:
    """The template that is used when there are tools; of a list or dict the one for that."""
    if template is None or isinstance(template, str):
        return template or ""
    if isinstance(template, Mapping):
        named = dict(template)
    else:
        named = {str(each.get("name")): each.get("template", "") for each in template
                 if isinstance(each, Mapping)}  # fmt: skip
    for name in ("tool_use", "default"):
        if isinstance(text := named.get(name), str):
            return text
    return next((text for text in named.values() if isinstance(text, str)), "")


@lru_cache(maxsize=64)
def _by_template(template: str, tokens: frozenset[str]) -> AnswerFormat:
    family = next((each for each in FAMILIES if _shows(each, template)), None)
    if family is None and "tools" in template:  # and does not write a call out
        family = next((each for each in FAMILIES if _shows(each, tokens)), None)
    reasoning = REASONING.get(family.reasoning) if family else None
    if reasoning is None:
        reasoning = next(
            (each for name, each in REASONING.items()
             if _has(each.close, template) and (name == "think" or _has(each.open, template))), None
        )  # fmt: skip
    if family is None:
        name = "text" if reasoning else "none"
        return AnswerFormat(name, "template" if reasoning else "none", reasoning)
    return _of(family, reasoning)


def _has(marker: str, template: str) -> bool:
    return marker in template or marker.replace("\n", "\\n") in template


def _of(family: Family, reasoning: ReasoningFormat | None) -> AnswerFormat:
    return AnswerFormat(
        family.name, "template", reasoning, family.calls, family.drop, family.structure
    )


def _shows(family: Family, where: str | frozenset[str]) -> bool:
    return any(all(mark in where for mark in group) for group in family.marks)


def _with_calls(found: AnswerFormat, option: object) -> AnswerFormat:
    if isinstance(option, ToolFormat):
        return replace(found, name="own", chosen_by="option", calls=(option,), structure="tagged")
    if option == "none":
        return replace(found, name="none", chosen_by="option", calls=(), structure="tagged")
    family = _BY_NAME[_known("tool_format", option, _BY_NAME)]
    reasoning = REASONING.get(family.reasoning) or found.reasoning
    return replace(_of(family, reasoning), chosen_by="option")


def _with_reasoning(found: AnswerFormat, option: object) -> AnswerFormat:
    if isinstance(option, ReasoningFormat):
        return replace(found, chosen_by="option", reasoning=option)
    if option == "none":
        return replace(found, chosen_by="option", reasoning=None)
    name = _known("reasoning_format", option, REASONING)
    return replace(found, chosen_by="option", reasoning=REASONING[name])


def _known(option: str, given: object, names: Collection[str]) -> str:
    if isinstance(given, str) and given in names:
        return given
    if not isinstance(given, str):
        kind = type(given).__name__
        raise InvalidRequest(option, f"a name or a format is expected, not {kind}")
    near = difflib.get_close_matches(given[:_SHOWN], names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(names))}"
    raise InvalidRequest(option, f"no format is named {given[:_SHOWN]!r}; {hint}")
