"""The grammar of a value between tags: text as it is, and anything else as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_engine.chat.argument_types import cast, types_of
from mlx_engine.chat.lark import ANY, Lark
from mlx_engine.chat.source import Malformed
from mlx_engine.chat.string_grammar import string_content
from mlx_engine.chat.tool_schemas import OfferedTool, alternatives_of


@dataclass(frozen=True, slots=True)
class TaggedValue:
    """The rules for a value.

    Attributes:
        texts: of those that are text, each with what ends it.
        others: of those that are JSON, without.
    """

    texts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def tagged_value(
    lark: Lark, tool: OfferedTool, schema: Mapping[str, Any], close: str, *, told: bool
) -> TaggedValue:
    """The rules for a value that is written between tags.

    Args:
        lark: gets them.
        tool: whose argument it is.
        schema: of the value.
        close: what ends it.
        told: the tag tells whether it is text.
    """
    found = TaggedValue()
    types = types_of(schema, tool.schema)
    for each in alternatives_of(tool, schema):
        kinds = types_of(each, tool.schema)
        if listed := _listed(each):
            _enumerate(lark, tool, listed, types, close, found)
        elif not kinds:
            found.texts.append(lark.until(close))
            if told:
                found.others.append(lark.rule(tool.json_rule({"type": sorted(_LIKE)})))
        elif kinds == {"string"}:
            content = string_content(tool, each)
            if len(types) > 1:
                content = lark.terminal(f"({content} & {_no_other(types)})")
            found.texts.append(lark.until(close, content))
        else:
            found.others.append(lark.rule(tool.json_rule(tool.within(each))))
    return found


def _listed(schema: Mapping[str, Any]) -> list[Any]:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def _enumerate(
    lark: Lark,
    tool: OfferedTool,
    values: list[Any],
    types: frozenset[str],
    close: str,
    found: TaggedValue,
) -> None:
    for value in values:
        is_text = isinstance(value, str)
        text = value if is_text else json.dumps(value, ensure_ascii=False)
        if _read(text, types) != json.dumps(value) or close in text + close[:-1]:
            raise tool.refused(f"{value!r} cannot be told from other values in this model's format")
        rule = lark.spelled(text)
        if is_text:
            found.texts.append(f"{rule} {lark.literal(close)}" if text else lark.literal(close))
        else:
            found.others.append(rule)


def _read(text: str, types: frozenset[str]) -> str:
    """The value that the parser makes of a text."""
    try:
        return json.dumps(json.loads(cast(text, types)))
    except Malformed:
        return ""


# What a text must not look like, where it may be a value of another type too.
_LIKE = {
    "null": r"null|None",
    "boolean": r"true|True|false|False",
    "integer": r"[-+.0-9](?s:.*)",
    "number": r"[-+.0-9](?s:.*)",
    "object": r"\{(?s:.*)",
    "array": r"\[(?s:.*)",
}


def _no_other(types: frozenset[str]) -> str:
    like = "|".join(sorted({_LIKE[name] for name in types if name in _LIKE}))
    return rf"~/\s*({like})\s*/" if like else ANY
