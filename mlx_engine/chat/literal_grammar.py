"""The grammar of a value as Python and Gemma write it; see ``literal``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.argument_types import item_schema, types_of
from mlx_engine.chat.lark import Lark
from mlx_engine.chat.literal import PYTHON, Dialect
from mlx_engine.chat.string_grammar import string_content
from mlx_engine.chat.tool_schemas import (
    NOTES,
    OfferedTool,
    alternatives_of,
    members_of,
    others_of,
    resolved,
)
from mlx_engine.errors import InvalidRequest

_COMMA = "/, ?/"
_BARE_KEY = r"/[A-Za-z_][\w\-]{0,63}:/"
# Strings of Python's, without the halves of characters that it has no escapes for.
_ESCAPE = r"\\([\\'\x22nrtbf]|u([0-9a-cefA-CEF][0-9a-fA-F]|[dD][0-7])[0-9a-fA-F]{2})"
_STRINGS = tuple(rf"/{quote}([^{quote}\\\x00-\x1f]|{_ESCAPE})*{quote}/" for quote in (r"\x22", "'"))
_PLAIN = r"[^'\\\x00-\x1f]"  # characters that stand for themselves
_ANY_TYPE = ("array", "boolean", "null", "number", "object", "string")


class LiteralGrammar:
    """The writer of rules for the values of one tool's arguments.

    Args:
        lark: gets them.
        tool: whose arguments they are.
        dialect: in which they are written.
    """

    def __init__(self, lark: Lark, tool: OfferedTool, dialect: Dialect) -> None:
        self._lark = lark
        self._tool = tool
        self._is_python = dialect is PYTHON
        self._quote = dialect.quotes[0]
        words = ("True", "False", "None") if self._is_python else ("true", "false", "null")
        true, false, null = map(lark.spelled, words)
        self._words = {"boolean": f"({true} | {false})", "null": null}
        self._names: dict[str, str] = {}  # of rules, by their schemas: one may refer to itself

    def rule(self, schema: Mapping[str, Any]) -> str:
        """A rule for a value that a schema allows.

        Raises:
            InvalidRequest: the schema cannot be enforced.
        """
        key = json.dumps(schema, sort_keys=True)
        if key not in self._names:
            name = self._names[key] = self._lark.name()
            self._lark.define(name, " | ".join(self._choices(schema)))
        return self._names[key]

    def _choices(self, schema: Mapping[str, Any]) -> list[str]:
        if not self._is_python:
            return self._taken_apart(schema)
        try:
            return self._taken_apart(schema)
        except InvalidRequest:  # but JSON, which Python's syntax nearly has in it, tells more
            return [self._json(schema)]

    def _taken_apart(self, schema: Mapping[str, Any]) -> list[str]:
        found: list[str] = []
        for each in self._parts(schema):
            listed = [each["const"]] if "const" in each else each.get("enum")
            if isinstance(listed, list):
                found += [self._written(value) for value in listed]
                continue
            types = types_of(each, self._tool.schema) or _ANY_TYPE
            found += [self._of_type(name, each) for name in sorted(types)]
        return found

    def _parts(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        schema = resolved(self._tool, schema)
        for union in ("anyOf", "oneOf"):
            if isinstance(choices := schema.get(union), list) and "type" not in schema:
                if others := schema.keys() - NOTES - {union}:
                    raise self._tool.refused(f"{min(others)!r} beside {union!r} cannot be enforced")
                return [part for choice in choices for part in self._parts(choice)]
        return alternatives_of(self._tool, schema)

    def _of_type(self, name: str, schema: Mapping[str, Any]) -> str:
        if name in self._words:
            return self._words[name]
        if name == "string":
            return self._string(schema)
        if name == "array":
            return self._list(schema)
        if name == "object":
            return self._object(schema)
        return self._json({**schema, "type": name})

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self._lark.rule(self._tool.json_rule(self._tool.within(schema)))

    def _string(self, schema: Mapping[str, Any]) -> str:
        if not self._is_python:
            text = string_content(self._tool, {**schema, "type": "string"})
            return f"{self._lark.literal(self._quote)} {self._lark.until(self._quote, text)}"
        if schema.keys() <= NOTES | {"type"}:
            return f"({' | '.join(map(self._lark.terminal, _STRINGS))})"
        schema = {**schema, "type": "string"}
        double = self._json(schema)
        try:
            single = string_content(self._tool, schema, _PLAIN)
        except InvalidRequest:
            return double
        quote = self._lark.spelled("'")
        return f"({double} | {self._lark.terminal(f'{quote} ({single}) {quote}')})"

    def _list(self, schema: Mapping[str, Any]) -> str:
        for key in schema.keys() - NOTES - {"type", "items", "minItems", "maxItems"}:
            raise self._tool.refused(f"{key!r} cannot be enforced in this model's format")
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        item = self.rule(item_schema(schema, self._tool.schema))
        if high == 0:
            return '"[" "]"'
        most = "" if high is None else int(high) - 1
        items = f"{item} ({_COMMA} {item}){{{max(low - 1, 0)},{most}}}"
        return f'"[" {items} "]"' if low else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        known = members_of(self._tool, schema)
        others = others_of(schema)
        if known or others is None:
            items = [
                (self._lark.rule(f"{self._key(key)} {self.rule(each)}"), must)
                for key, each, must in known
            ]
            return f'"{{" {self._lark.members(items, _COMMA)} "}}"'
        member = self._lark.rule(f"{self._any_key()} {self.rule(others)}")
        return f'"{{" ({member} ({_COMMA} {member})*)? "}}"'

    def _key(self, key: str) -> str:
        if not self._is_python:
            return self._lark.spelled(f"{key}:")
        return f"{self._quoted(key)} /: ?/"

    def _any_key(self) -> str:
        if not self._is_python:
            return self._lark.terminal(_BARE_KEY)
        return f"({' | '.join(map(self._lark.terminal, _STRINGS))}) /: ?/"

    def _written(self, value: Any) -> str:
        """The expression for just this value."""
        spelled = self._lark.spelled
        if isinstance(value, str):
            return self._written_text(value)
        if isinstance(value, Mapping):
            items = [f"{self._key(key)} {self._written(item)}" for key, item in value.items()]
            return " ".join(['"{"', f" {_COMMA} ".join(items), '"}"'])
        if isinstance(value, list):
            return " ".join(['"["', f" {_COMMA} ".join(map(self._written, value)), '"]"'])
        return spelled(repr(value) if self._is_python else json.dumps(value))

    def _written_text(self, value: str) -> str:
        if self._is_python:
            return self._quoted(value)
        if self._quote in value:
            raise self._tool.refused(f"{value!r} cannot be written in this model's format")
        quote = self._lark.literal(self._quote)
        return f"{quote} {self._lark.spelled(value)} {quote}" if value else f"{quote} {quote}"

    def _quoted(self, text: str) -> str:
        """The expression for just this text between Python's quotes, of both kinds if it can be."""
        double = json.dumps(text, ensure_ascii=False)
        if "'" in text or double != f'"{text}"':
            return self._lark.spelled(double)
        single = "'" + text + "'"
        return f"({self._lark.spelled(double)} | {self._lark.spelled(single)})"
