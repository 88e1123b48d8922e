"""The grammar of a value as Gemma writes it: bare keys, and strings between marks of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.lark import Lark
from mlx_engine.chat.schema import item_schema, types_of
from mlx_engine.chat.string_grammar import string_content
from mlx_engine.chat.tool_schemas import OfferedTool, alternatives_of, members_of, resolved

_WORDS = {"boolean": '("true" | "false")', "null": '"null"'}


def gemma_value(lark: Lark, tool: OfferedTool, schema: Mapping[str, Any] | None, quote: str) -> str:
    """A rule for a value that a schema allows.

    Args:
        lark: gets it.
        tool: whose argument it is.
        schema: of the value; ``None`` for any object.
        quote: what a string begins and ends with.
    """
    values = _Values(lark, tool, quote)
    return values.free() if schema is None else values.rule(schema)


class _Values:
    def __init__(self, lark: Lark, tool: OfferedTool, quote: str) -> None:
        self._lark = lark
        self._tool = tool
        self._quote = quote
        self._names: dict[str, str] = {}  # of rules, by their schemas: one may refer to itself

    def rule(self, schema: Mapping[str, Any]) -> str:
        key = json.dumps(schema, sort_keys=True)
        if key not in self._names:
            name = self._names[key] = self._lark.name()
            self._lark.define(name, " | ".join(self._choices(schema)))
        return self._names[key]

    def _choices(self, schema: Mapping[str, Any]) -> list[str]:
        found: list[str] = []
        for each in self._parts(schema):
            listed = [each["const"]] if "const" in each else each.get("enum")
            if isinstance(listed, list):
                found += [self._written(value) for value in listed]
                continue
            types = types_of(each, self._tool.schema)
            for name in sorted(types) or ["any"]:
                found.append(self._of_type(name, each))
        return found

    def _parts(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        schema = resolved(self._tool, schema)
        for union in ("anyOf", "oneOf"):
            if isinstance(choices := schema.get(union), list):
                return [part for choice in choices for part in self._parts(choice)]
        return alternatives_of(self._tool, schema)

    def _of_type(self, name: str, schema: Mapping[str, Any]) -> str:
        if name in _WORDS:
            return _WORDS[name]
        if name == "string":
            text = string_content(self._tool, {**schema, "type": "string"})
            return f"{self._lark.literal(self._quote)} {self._lark.until(self._quote, text)}"
        if name == "array":
            return self._list(schema)
        if name == "object":
            return self._object(schema)
        if name == "any":
            return self._any()
        return self._lark.rule(self._tool.json_rule(self._tool.within({**schema, "type": name})))

    def _list(self, schema: Mapping[str, Any]) -> str:
        for key in schema.keys() & {"prefixItems", "contains", "uniqueItems"}:
            raise self._tool.refused(f"{key!r} cannot be enforced in this model's format")
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        item = self.rule(item_schema(schema, self._tool.schema))
        if high == 0:
            return '"[" "]"'
        most = "" if high is None else int(high) - 1
        items = f'{item} ("," {item}){{{max(low - 1, 0)},{most}}}'
        return f'"[" {items} "]"' if low else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        items = [
            (self._lark.rule(f"{self._lark.literal(f'{key}:')} {self.rule(each)}"), must)
            for key, each, must in members_of(self._tool, schema)
        ]
        return f'"{{" {self._lark.members(items, chr(34) + "," + chr(34))} "}}"'

    def _written(self, value: Any) -> str:
        """The expression for just this value."""
        spelled, quote = self._lark.spelled, self._lark.literal(self._quote)
        if isinstance(value, str):
            if self._quote in value:
                raise self._tool.refused(f"{value!r} cannot be written in this model's format")
            return f"{quote} {spelled(value)} {quote}"
        if isinstance(value, Mapping):
            items = [f"{spelled(f'{key}:')} {self._written(item)}" for key, item in value.items()]
        elif isinstance(value, list):
            items = [self._written(item) for item in value]
        else:
            return spelled(json.dumps(value))
        open_, close = ('"["', '"]"') if isinstance(value, list) else ('"{"', '"}"')
        return " ".join([open_, ' "," '.join(items), close])

    def anything(self) -> str:
        """A rule for any value."""
        return self.rule({})

    def _any(self) -> str:
        each = self.anything()
        member = self._lark.rule(f"{self._lark.terminal(_KEY)} {each}")
        scalars = [self._of_type(name, {}) for name in ("string", "number", "boolean", "null")]
        lists = [f'"{a}" ({item} ("," {item})*)? "{b}"' for a, item, b in
                 (("[", each, "]"), ("{", member, "}"))]  # fmt: skip
        return self._lark.any_of([*scalars, *lists])

    def free(self) -> str:
        """A rule for any object."""
        member = self._lark.rule(f"{self._lark.terminal(_KEY)} {self.anything()}")
        return self._lark.rule(f'"{{" ({member} ("," {member})*)? "}}"')


_KEY = r"/[A-Za-z_][\w\-]{0,63}:/"
