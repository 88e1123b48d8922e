"""Whether two schemas may allow the same value: alternatives of ``oneOf`` must not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_engine.grammars.json_values import same
from mlx_engine.grammars.keywords import TYPES

_DEEPEST = 8  # steps into schemas

Schema = dict[str, Any] | bool


class Overlap:
    """Comparison of schemas, as ``json_schema`` writes them.

    Args:
        definitions: what they refer to.
        steps: comparisons in all, after which any two overlap.
    """

    def __init__(self, definitions: Mapping[str, Schema], steps: int = 100_000) -> None:
        self._definitions = definitions
        self._steps = steps
        self._known: dict[int, tuple[set[str], set[str] | None]] = {}  # by identity

    def apart(self, one: Schema, other: Schema, depth: int = 0) -> bool:
        """Whether it is certain that no value satisfies both."""
        self._steps -= 1
        if self._steps < 0 or depth > _DEEPEST:
            return False
        if one is False or other is False:
            return True
        if isinstance(one, bool) or isinstance(other, bool):
            return False
        types, values = self._facts(one)
        other_types, other_values = self._facts(other)
        if types.isdisjoint(other_types):
            return True
        if values is not None and other_values is not None and values.isdisjoint(other_values):
            return True
        return (
            self._by_parts(one, other, depth)
            or self._by_parts(other, one, depth)
            or (types & other_types == {"object"} and self._by_keys(one, other, depth))
        )

    def _facts(self, schema: dict[str, Any]) -> tuple[set[str], set[str] | None]:
        """The types that a schema allows, and its constants, if it has some."""
        if id(schema) not in self._known:
            self._known[id(schema)] = _types(schema), _values(schema)
        return self._known[id(schema)]

    def _by_parts(self, one: dict[str, Any], other: Schema, depth: int) -> bool:
        """Whether what one is made of is apart from the other."""
        if "$ref" in one:
            name = one["$ref"].rpartition("/")[2]
            if self.apart(self._definitions.get(name, True), other, depth + 1):
                return True
        if any(self.apart(part, other, depth + 1) for part in one.get("allOf", ())):
            return True
        choices = one.get("anyOf", ())
        return bool(choices) and all(self.apart(each, other, depth + 1) for each in choices)

    def _by_keys(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        for key in dict.fromkeys((*one.get("required", ()), *other.get("required", ()))):
            if self.apart(_member(one, key), _member(other, key), depth + 1):
                return True
        return False


def _member(schema: dict[str, Any], key: str) -> Schema:
    """The schema of the value at a key, as far as it is certain."""
    known: dict[str, Schema] = schema.get("properties", {})
    if key in known:
        return known[key]
    closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    return not closed


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that are allowed; every integer is a number, too."""
    given = schema.get("type", TYPES)
    found = {given} if isinstance(given, str) else set(given)
    values = _constants(schema)
    if values is not None:
        found &= {_type_of(value) for value in values} | (
            {"number"} if any(_type_of(value) == "integer" for value in values) else set()
        )
    if "number" in found:
        found.add("integer")
    return found


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", str: "string", list: "array", dict: "object"}
    if type(value) in kinds:
        return kinds[type(value)]
    return "integer" if float(value).is_integer() else "number"


def _constants(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    found: list[Any] | None = schema.get("enum")
    return found


def _values(schema: dict[str, Any]) -> set[str] | None:
    values = _constants(schema)
    return None if values is None else {same(value) for value in values}
