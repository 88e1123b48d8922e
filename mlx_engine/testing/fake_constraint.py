"""Scripted answers held against what the request allows: its constraint, its tools."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_engine.chat.tool_schemas import OfferedTool, offered_tools, resolved
from mlx_engine.checks import shown
from mlx_engine.constraints import AnyJSON, Constraint, JSONSchema
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import ToolCall
from mlx_engine.requests import ChatPrompt
from mlx_engine.testing.script_error import ScriptError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Strings, what a space follows, and spaces.
_PARTS = re.compile(r'(?P<string>"(?:[^"\\]|\\.)*)(?P<end>"?)|(?P<comma>[,:])|\s+', re.DOTALL)
_AROUND = 20  # characters that an error shows on either side of the place


def check_content(constraint: Constraint, text: str, whole: bool) -> None:
    """See that a model could have written this content under a constraint.

    Args:
        whole: whether the answer came to its own end.

    Raises:
        InvalidRequest: the constraint cannot be followed.
        ScriptError: the content breaks it: a mistake of the script.
    """
    if (problem := _problem(constraint, text, whole)) is not None:
        raise ScriptError(
            f"the scripted answer breaks the constraint of the request: {problem}; the constraint "
            f"is {shown(constraint)}"
        )


def check_calls(calls: Sequence[ToolCall], has_text: bool, whole: bool, chat: ChatPrompt) -> None:
    """See that a model could have made these calls, where ``tool_choice`` asks for some or tools
    are ``strict``.

    Args:
        has_text: whether there is content as well.
        whole: whether the answer came to its own end.

    Raises:
        ScriptError: it could not: a mistake of the script.
    """
    choice, offered = chat.tool_choice, offered_tools(chat.offered or ())
    tools = {tool.name: tool for tool in offered}
    asked = choice not in ("auto", "none")
    if not asked and not any(tool.strict for tool in offered):
        return
    if asked and (has_text or (whole and not calls)):
        what = "content is scripted" if has_text else "no call is scripted"
        raise ScriptError(
            f"{what}, but the request has tool_choice={shown(choice)}, with which the answer is "
            "calls and no text"
        )
    name = choice["function"]["name"] if isinstance(choice, Mapping) else None
    if len(calls) > 1 and (name or not chat.parallel_tool_calls):
        raise ScriptError(f"{len(calls)} calls are scripted, but the request allows one")
    for call in calls:
        if call.ok:
            _check_call(call, tools, name, asked)
        elif whole or call is not calls[-1]:
            raise ScriptError(
                f"a malformed call is scripted ({call.error}), but the calls of this request are "
                "bound: only one in which the answer is cut, with FakeAnswer(..., "
                "finish_reason='length'), can be malformed"
            )


def _check_call(
    call: ToolCall, tools: Mapping[str, OfferedTool], name: str | None, asked: bool
) -> None:
    if name not in (None, call.name):
        raise ScriptError(f"a call of {call.name!r} is scripted; tool_choice names {name!r}")
    tool = tools[call.name]
    if not (asked or tool.strict):
        return
    text = json.dumps(_ordered(call.arguments, tool.schema, tool), ensure_ascii=False)
    if (problem := _problem(JSONSchema(tool.schema), text, True)) is not None:
        raise ScriptError(f"the scripted arguments of {call.name!r} break its schema: {problem}")


def _problem(constraint: Constraint, text: str, whole: bool) -> str | None:
    """The mistake in a text; ``None`` if there is none."""
    given = text
    if isinstance(constraint, JSONSchema | AnyJSON):
        text = _as_models_write(text)
    matcher = _matcher(f"start: {constraint.rule}")
    if matcher.is_error():
        raise InvalidRequest("constraint", matcher.get_error())
    encoded = text.encode()
    taken = matcher.try_consume_tokens(list(encoded))
    if taken < len(encoded):
        at = len(encoded[:taken].decode(errors="ignore"))
        if not at:  # perhaps no JSON at all: as the script has it
            text = given.lstrip()
        before, after = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
        return f"at character {at}, {after!r} cannot follow {before!r}"
    if whole and not matcher.is_accepting():
        return (
            f"it wants more behind {text[-_AROUND:]!r} (FakeAnswer(..., finish_reason='length') "
            "is one that is cut)"
        )
    return None


def _as_models_write(text: str) -> str:
    """JSON, perhaps cut, with the spaces of ``json.dumps`` and no escapes that it can do without:
    scripts may have others, as what libraries make of a value.
    """
    return _PARTS.sub(_part, text)


def _part(found: re.Match[str]) -> str:
    if found["comma"]:
        return found["comma"] + " "
    if not found["string"]:
        return ""  # spaces
    try:
        written = json.dumps(json.loads(found["string"] + '"'), ensure_ascii=False)
        written.encode()
    except ValueError:  # no JSON, or half a character
        return found[0]
    return written if found["end"] else written[:-1]


def _ordered(value: Any, schema: Any, tool: OfferedTool) -> Any:
    """A value whose members are in the order of its schema, in which models write them."""
    if not isinstance(schema, Mapping):
        return value
    schema = resolved(tool, schema)
    if isinstance(value, list):
        return [_ordered(each, schema.get("items"), tool) for each in value]
    if not isinstance(value, Mapping):
        return value
    known = schema.get("properties") or {}
    names = [name for name in known if name in value]
    names += [name for name in value if name not in known]
    return {name: _ordered(value[name], known.get(name), tool) for name in names}


def _matcher(lark: str) -> LLMatcher:
    from llguidance import LLMatcher  # noqa: PLC0415 - takes longer than all else here

    return LLMatcher(_bytes(), LLMatcher.grammar_from_lark(lark))


@functools.cache
def _bytes() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    from llguidance import LLTokenizer  # noqa: PLC0415

    return LLTokenizer("byte")
