"""Schemas as applications and agents write them, and some that nobody would: data for the tests.

Every one can be enforced, and has answers of a few hundred bytes.
"""

from __future__ import annotations

from typing import Any


def record(properties: dict[str, Any], *, closed: bool = True, **more: Any) -> dict[str, Any]:
    """An object that has all of ``properties``, and no others if it is closed."""
    schema = {"type": "object", "properties": properties, "required": [*properties], **more}
    return {**schema, "additionalProperties": False} if closed else schema


SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
PAIR = {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2}

TREE = {
    "$defs": {
        "node": record(
            {"v": DIGIT, "left": {"$ref": "#/$defs/next"}, "right": {"$ref": "#/$defs/next"}}
        ),
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
    "$ref": "#/$defs/node",
}

SHAPES = {
    "oneOf": [
        record({"kind": {"const": "circle"}, "r": {"type": "number", "minimum": 0, "maximum": 9}}),
        record({"kind": {"const": "square"}, "side": DIGIT}),
        record({"kind": {"enum": ["line", "arrow"]}, "to": PAIR}),
    ]
}

EDIT = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "edit",
    "description": "Replaces a text in a file.",
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "of the file", "maxLength": 12},
        "old": {"type": "string", "maxLength": 8, "default": ""},
        "new": {"type": "string", "maxLength": 8},
        "all": {"type": "boolean", "default": False},
    },
    "required": ["path", "new"],
    "additionalProperties": False,
}

INVOICE = record(
    {
        "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
        "date": {"type": "string", "format": "date"},
        "paid": {"type": "boolean"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": record({"text": SHORT, "count": DIGIT, "price": {"enum": [1, 2.5, 10]}}),
        },
        "total": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1000},
    }
)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels):
        schema = record({"in": schema})
    return schema


SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "string": {"type": "string", "maxLength": 20},
    "string of a length": {"type": "string", "minLength": 3, "maxLength": 5},
    "string with a pattern": {"type": "string", "pattern": "^[a-z]{2,4}(-[0-9]+)?$"},
    "pattern that is not anchored": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 6},
    "pattern of unicode": {"type": "string", "pattern": "^[äöü€]{1,3}$"},
    "integer": {"type": "integer"},
    "integer with bounds": {"type": "integer", "minimum": -17, "maximum": 230},
    "integer above": {"type": "integer", "exclusiveMinimum": 99},
    "number": {"type": "number"},
    "number with bounds": {"type": "number", "minimum": -0.5, "maximum": 1.25},
    "number between": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "enum of strings": {"enum": ["red", "green", "blue", "äöü", 'with "quotes"', "\\"]},
    "enum of anything": {"enum": [1, "1", None, True, [1, 2], {"a": []}, 2.5]},
    "typed enum": {"type": "string", "enum": ["low", "high"]},
    "const": {"const": {"a": [1, "x", None], "ü": False}},
    "const number": {"const": -12},
    "date-time": {"type": "string", "format": "date-time"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "duration": {"type": "string", "format": "duration"},
    "email": {"type": "string", "format": "email"},
    "hostname": {"type": "string", "format": "hostname", "maxLength": 20},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "uri": {"type": "string", "format": "uri"},
    "empty object": record({}),
    "any object": {"type": "object"},
    "anything": True,
    "object": record({"a": DIGIT, "b": SHORT}),
    "optional properties": {
        "type": "object",
        "properties": {"a": DIGIT, "b": {"type": "null"}, "c": {"type": "boolean"}, "d": SHORT},
        "required": ["c"],
        "additionalProperties": False,
    },
    "more properties": record({"a": DIGIT}, closed=False, additionalProperties=DIGIT),
    "any more properties": record({"a": DIGIT, "b": {"type": "null"}}, closed=False),
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "keys with a pattern": {
        "type": "object",
        "patternProperties": {"^n_": {"type": "number"}, "^s_": SHORT},
        "additionalProperties": False,
    },
    "unicode keys": record({"größe": DIGIT, "名前": SHORT, "🙂": {"type": "null"}, "a b": DIGIT}),
    "keys that need escapes": record(
        {'"': DIGIT, "\\": DIGIT, "\n": DIGIT, "/": DIGIT, "#": DIGIT}
    ),
    "required beside properties": {
        "type": "object",
        "properties": {"a": DIGIT},
        "required": ["a", "b"],
        "additionalProperties": {"type": "boolean"},
    },
    "nested": record({"a": record({"b": record({"c": {"type": "array", "items": PAIR}})})}),
    "deep": _deep(24),
    "array": {"type": "array", "items": DIGIT},
    "array with bounds": {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 4},
    "array of arrays": {"type": "array", "items": PAIR, "maxItems": 3},
    "tuple": {
        "type": "array",
        "prefixItems": [DIGIT, SHORT, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "tuple and more": {
        "type": "array",
        "prefixItems": [SHORT],
        "items": {"type": "null"},
        "minItems": 1,
    },
    "any array": {"type": "array", "maxItems": 2},
    "nullable": record({"a": {"type": ["string", "null"], "maxLength": 4}, "b": {"type": "null"}}),
    "several types": {"type": ["integer", "boolean", "null"]},
    "anyOf": {"anyOf": [DIGIT, SHORT, PAIR, record({"x": DIGIT})]},
    "anyOf beside properties": {
        "type": "object",
        "properties": {"id": DIGIT},
        "required": ["id"],
        "anyOf": [
            {"properties": {"a": SHORT}, "required": ["a"]},
            {"properties": {"b": DIGIT}, "required": ["b"]},
        ],
    },
    "oneOf by a constant": SHAPES,
    "oneOf by type": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}, PAIR]},
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"type": "object", "properties": {"b": SHORT}, "required": ["b"]},
        ]
    },
    "allOf of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "recursive": TREE,
    "recursive list": {
        "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 2}},
        "$ref": "#/$defs/list",
    },
    "recursive through the root": record(
        {"name": SHORT, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}
    ),
    "definitions": {
        "definitions": {
            "word": SHORT,
            "pair": {"type": "array", "items": {"$ref": "#/definitions/word"}},
        },
        "type": "object",
        "properties": {"a": {"$ref": "#/definitions/word"}, "b": {"$ref": "#/definitions/pair"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "annotations": {
        "title": "a",
        "description": "b",
        "default": 3,
        "examples": [1, 2],
        "deprecated": True,
        "readOnly": True,
        "$comment": "c",
        "type": "integer",
    },
    "an edit": EDIT,
    "an invoice": INVOICE,
}
