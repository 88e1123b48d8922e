"""Schemas that refer to themselves without an end: nothing finite satisfies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_engine.grammars.keywords import TYPES

Schema = dict[str, Any] | bool


def endless(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """Whether it is certain that no value satisfies a schema, as ``json_schema`` writes them."""
    finite: set[str] = set()
    found = True
    while found:
        found = False
        for name in reversed([*definitions]):  # what others need comes behind them, as a rule
            if name not in finite and _finite(definitions[name], finite):
                finite.add(name)
                found = True
    return not _finite(root, finite)


def _finite(schema: Schema, finite: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    if "const" in schema or "enum" in schema:
        return True
    if "anyOf" in schema and not any(_finite(each, finite) for each in schema["anyOf"]):
        return False
    if not all(_finite(each, finite) for each in schema.get("allOf", ())):
        return False
    given = schema.get("type", TYPES)
    types = {given} if isinstance(given, str) else set(given)
    return (
        bool(types - {"object", "array"})
        or ("object" in types and _finite_object(schema, finite))
        or ("array" in types and _finite_array(schema, finite))
    )


def _finite_object(schema: dict[str, Any], finite: set[str]) -> bool:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    patterned = "patternProperties" in schema
    return all(
        _finite(known[key], finite) if key in known else patterned or _finite(rest, finite)
        for key in schema.get("required", ())
    )


def _finite_array(schema: dict[str, Any], finite: set[str]) -> bool:
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    if not all(_finite(each, finite) for each in first[:least]):
        return False
    return least <= len(first) or _finite(schema.get("items", True), finite)
