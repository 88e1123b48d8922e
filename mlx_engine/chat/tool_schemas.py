"""Tools as grammars need them: a name, and a schema of the arguments that is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_engine.chat.argument_types import referred, types_of
from mlx_engine.constraints import JSONSchema
from mlx_engine.errors import InvalidRequest

_MOST_STEPS = 64  # from one reference to the next
_OF_TEXT = {"minLength", "maxLength", "pattern", "format"}
_OF_OBJECTS = {"type", "properties", "required", "additionalProperties"}
# Keywords that allow and forbid nothing.
NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$id", "$schema", "$defs", "definitions", "nullable", "strict"),
}
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "additionalProperties")


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool that a model may call.

    Attributes:
        name: of the tool.
        schema: of its arguments, which are an object.
        strict: whether the arguments must be what the schema says, wherever it is called.
        place: of the schema in the request, for errors.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    place: str

    def refused(self, problem: str) -> InvalidRequest:
        """The error for a schema that cannot be enforced."""
        return InvalidRequest(self.place, f"tool {self.name!r}: {problem}")

    def json_rule(self, schema: Mapping[str, Any] | bool) -> str:
        """The right-hand side of a rule for JSON by a schema.

        Raises:
            InvalidRequest: it cannot be enforced.
        """
        try:
            return JSONSchema(schema).rule
        except InvalidRequest as error:
            problem = str(error).removeprefix(f"{error.option}: ")
            raise self.refused(problem) from error

    def within(self, schema: Any) -> dict[str, Any]:
        """The schema of one value, in which references are still found."""
        schema = schema if isinstance(schema, Mapping) else {}
        if '"$ref"' not in json.dumps(schema):
            return dict(schema)
        moved: dict[str, Any] = _moved(schema)
        return {**moved, "$defs": {**moved.get("$defs", {}), "root": _moved(self.schema)}}


def offered_tools(tools: Sequence[Mapping[str, Any]]) -> list[OfferedTool]:
    """The tools of a request, as a chat template gets them."""
    found: list[OfferedTool] = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        found.append(
            OfferedTool(
                function["name"],
                _completed(function.get("parameters")),
                function.get("strict") is True,
                f"tools[{number}].function.parameters",
            )
        )
    return found


def _completed(given: object) -> dict[str, Any]:
    """The schema of arguments with what it leaves out: other arguments than it has are none."""
    schema = dict(given) if isinstance(given, Mapping) else {"properties": {}}
    if not any(key in schema for key in (*_COMBINED, "properties", "type")):
        schema["properties"] = {}
    schema.setdefault("type", "object")
    if "properties" in schema and not any(key in schema for key in _COMBINED):
        schema["additionalProperties"] = False
    return schema


def _moved(value: Any) -> Any:
    """A schema that refers to the one at ``#/$defs/root`` in the place of its own root."""
    if isinstance(value, Mapping):
        return {
            key: "#/$defs/root" + item[1:]
            if key == "$ref" and isinstance(item, str) and item.startswith("#")
            else _moved(item)
            for key, item in value.items()
        }
    return [_moved(item) for item in value] if isinstance(value, list) else value


def properties_of(tool: OfferedTool) -> list[tuple[str, Mapping[str, Any], bool]]:
    """The arguments of a tool, each with its schema and whether it is required.

    Raises:
        InvalidRequest: the schema does not tell them one by one.
    """
    return members_of(tool, tool.schema)


def others_of(schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of an object's members that it does not name; ``None`` if there are none."""
    others = schema.get("additionalProperties", True)
    if isinstance(others, Mapping):
        return others
    return {} if others is True and "properties" not in schema else None


def names_of(tool: OfferedTool) -> list[str]:
    """The names of a tool's arguments, as far as its schema tells them."""
    known = tool.schema.get("properties")
    return [str(name) for name in known] if isinstance(known, Mapping) else []


def members_of(
    tool: OfferedTool, schema: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any], bool]]:
    """The members of an object, each with its schema and whether it is required.

    Raises:
        InvalidRequest: the schema does not tell them one by one.
    """
    schema = resolved(tool, schema)
    for key in schema.keys() - _OF_OBJECTS - NOTES:
        raise tool.refused(f"{key!r} of an object cannot be enforced in this model's format")
    known, required = dict(schema.get("properties") or {}), list(schema.get("required") or ())
    others = schema.get("additionalProperties")
    for name in required:
        known.setdefault(name, others if isinstance(others, Mapping) else {})
    return [
        (name, each if isinstance(each, Mapping) else {}, name in required)
        for name, each in known.items()
        if each is not False
    ]


def resolved(tool: OfferedTool, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, or what it refers to."""
    for _ in range(_MOST_STEPS):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        found = referred(str(reference), tool.schema)
        if not isinstance(found, Mapping):
            break
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    raise tool.refused(f"{schema.get('$ref')!r} refers to nothing")


def alternatives_of(tool: OfferedTool, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Schemas that allow together what one does; each for text only, or for none.

    Raises:
        InvalidRequest: it cannot be taken apart.
    """
    schema = resolved(tool, schema)
    types = types_of(schema, tool.schema)
    if "string" not in types or (types == {"string"} and "type" in schema):
        return [schema]
    if schema.keys() & {"enum", "const"}:
        return [schema]
    for union in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(union), list):
            if others := schema.keys() - NOTES - {union, "type"}:
                raise tool.refused(f"{min(others)!r} beside {union!r} cannot be enforced")
            return [part for choice in choices for part in alternatives_of(tool, choice)]
    if isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
        return alternatives_of(tool, {**parts[0], **_without(schema, "allOf")})
    if "type" not in schema:
        raise tool.refused("a schema of text needs a 'type' in this model's format")
    text = {key: value for key, value in schema.items() if key in _OF_TEXT or key in NOTES}
    rest = {key: value for key, value in schema.items() if key not in _OF_TEXT}
    return [{**text, "type": "string"}, {**rest, "type": sorted(types - {"string"})}]


def _without(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != name}
