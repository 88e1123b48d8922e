"""Values that a model writes as bare text, made what the tool's JSON schema says they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_engine.chat.json_text import normalized, quoted
from mlx_engine.chat.literal import python_value
from mlx_engine.chat.source import Malformed

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
# What may be a text as well is a number only as JSON writes it: 007 and +1 are texts.
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_NULLS = ("null", "None")
_ANY = frozenset[str]()
_MOST_STEPS = 200  # through a schema that refers to itself

# The names that some write for JSON's types.
_NAMES = {
    "str": "string", "text": "string", "int": "integer", "long": "integer", "float": "number",
    "double": "number", "bool": "boolean", "dict": "object", "list": "array", "tuple": "array",
    "none": "null",
}  # fmt: skip


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows; none if it does not tell.

    Args:
        schema: of one value.
        root: the schema in which its references are looked up.
    """
    return frozenset(_types(schema, root, [_MOST_STEPS]))


def _types(schema: Any, root: Mapping[str, Any], steps: list[int]) -> set[str]:
    steps[0] -= 1
    if not isinstance(schema, Mapping) or steps[0] < 0:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return _types(referred(reference, root), root, steps)
    found: set[str] = set()
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str):
            found.add(_NAMES.get(name.lower(), name.lower()))
    for union in ("anyOf", "oneOf"):
        if not found and isinstance(choices := schema.get(union), list):
            each = [_types(choice, root, steps) for choice in choices]
            found = set().union(*each) if all(each) else set()
    if not found and isinstance(parts := schema.get("allOf"), list):
        told = [types for part in parts if (types := _types(part, root, steps))]
        found = set.intersection(*told) if told else set()
    if not found:
        found = _types_of_values(schema)
    if found and schema.get("nullable") is True:
        found.add("null")
    return found


def _types_of_values(schema: Mapping[str, Any]) -> set[str]:
    if "const" in schema:
        return {_type_of(schema["const"])}
    values = schema.get("enum")
    if isinstance(values, list):
        return {_type_of(value) for value in values}
    if "properties" in schema:
        return {"object"}
    return {"array"} if "items" in schema else set()


def _type_of(value: Any) -> str:
    for kind, name in (
        (bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"),
        (Mapping, "object"), (list, "array"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return "null"


def referred(reference: str, root: Mapping[str, Any]) -> Any:
    """The value that a reference refers to; ``None`` if there is none."""
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if not part:
            continue
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def argument_schema(
    name: str, schema: Mapping[str, Any], root: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The schema of a member of an object; empty if it does not tell.

    Args:
        name: of the member.
        schema: of the object.
        root: the schema in which references are looked up.
    """
    objects = _choices(schema, root, [_MOST_STEPS])
    for each in objects:
        known = each.get("properties")
        if isinstance(known, Mapping) and isinstance(found := known.get(name), Mapping):
            return found
    others = (each.get("additionalProperties") for each in objects)
    return next((each for each in others if isinstance(each, Mapping)), {})


def item_schema(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the items of a list; empty if it does not tell."""
    every = (each.get("items") for each in _choices(schema, root, [_MOST_STEPS]))
    return next((each for each in every if isinstance(each, Mapping)), {})


def _choices(schema: Any, root: Mapping[str, Any], steps: list[int]) -> list[Mapping[str, Any]]:
    """A schema, or what it refers to, and those that it is made of."""
    steps[0] -= 1
    if not isinstance(schema, Mapping) or steps[0] < 0:
        return []
    if isinstance(reference := schema.get("$ref"), str):
        return _choices(referred(reference, root), root, steps)
    found = [schema]
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(union), list):
            for part in parts:
                found += _choices(part, root, steps)
    return found


def argument_types(name: str, schema: Mapping[str, Any]) -> frozenset[str]:
    """The types of a tool's argument; none if its schema does not tell."""
    return types_of(argument_schema(name, schema, schema), schema)


def cast(text: str, types: Iterable[str]) -> str:
    """The JSON text of a value that was written as bare text.

    Raises:
        Malformed: the text is of none of the types.
    """
    types = frozenset(types)
    value = text.strip()
    if "null" in types and value in _NULLS:
        return "null"
    if "boolean" in types and value in _BOOLEANS:
        return json.dumps(_BOOLEANS[value])
    is_number = "string" not in types or _JSON_NUMBER.fullmatch(value)
    numbers = types & {"integer", "number"}
    if numbers and is_number and (number := _number(value, "number" in types)):
        return number
    if types & {"object", "array"} and (found := _container(value, types)):
        return found
    if "string" in types:
        return quoted(text)
    if not types or types.isdisjoint(_KNOWN):
        return _untyped(text)
    raise Malformed(f"{value[:40]!r} is no {' or '.join(sorted(types))}")


_KNOWN = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})


def _number(text: str, fractions: bool) -> str | None:
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text))
        if not _NUMBER.fullmatch(text):
            return None
        value = float(text)
    except ValueError:  # more digits than Python converts
        return None
    if not math.isfinite(value):
        return None
    if value.is_integer() and not fractions:
        return str(int(value))
    return json.dumps(value) if fractions else None


def _container(text: str, types: frozenset[str]) -> str | None:
    wanted = [kind for name, kind in (("object", "{"), ("array", "[")) if name in types]
    if text[:1] not in wanted:
        return None
    try:
        return normalized(text)
    except Malformed:
        pass
    try:
        return python_value(text)
    except Malformed:
        return None


def _untyped(text: str) -> str:
    value = text.strip()
    if value in _NULLS:
        return "null"
    if value in _BOOLEANS:
        return json.dumps(_BOOLEANS[value])
    number = _number(value, True) if _JSON_NUMBER.fullmatch(value) else None
    found = number or _container(value, frozenset({"object", "array"}))
    return found or quoted(text)
