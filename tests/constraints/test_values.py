"""Constraints as values: checked when they are made, copied, and the same elsewhere."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest

from mlx_engine import (
    AnyJSON,
    Choice,
    Constraint,
    Grammar,
    InvalidRequest,
    JSONSchema,
    Regex,
    RequestLimits,
    SamplingParams,
)
from mlx_engine.limits import DEFAULT_LIMITS
from mlx_engine.remote.wire.messages import Generate, decode_from_client
from mlx_engine.remote.wire.values import request_from_wire, request_to_wire
from mlx_engine.requests import GenerationRequest, TextPrompt
from tests.constraints.schemas import EDIT, SCHEMAS

VALUES: list[Constraint] = [
    JSONSchema(EDIT),
    JSONSchema(True),
    JSONSchema({"enum": ["ü", '"', "🙂"]}),
    JSONSchema({"description": 10**30, "type": "integer"}),
    Regex(r"\d{4}-\d\d/é\n"),
    Grammar('start: "(" start ")" | "x" // und é'),
    Choice(["yes", "no", "ä\n/"]),
    AnyJSON(),
]


def through(request: GenerationRequest, limits: RequestLimits = DEFAULT_LIMITS) -> Any:
    payload = request_to_wire(1, request, name="", stream=False, progress=False)
    (message,) = decode_from_client(payload)
    return request_from_wire(message, trusted=False, limits=limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("constraint", VALUES, ids=lambda value: type(value).__name__)
def test_a_constraint_is_a_value_and_equal_where_it_arrives(constraint: Constraint) -> None:
    params = SamplingParams(constraint=constraint)
    assert params.constraint is constraint
    arrived = through(GenerationRequest(TextPrompt("a"), params)).params
    assert arrived == params
    assert hash(arrived.constraint) == hash(constraint)
    assert arrived.constraint.rule == constraint.rule
    assert pickle.loads(pickle.dumps(constraint)) == constraint
    assert repr(constraint) in repr(params)


def test_a_schema_is_copied_and_what_becomes_of_it_changes_nothing() -> None:
    given: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = JSONSchema(given)
    rule = schema.rule
    given["properties"]["a"]["type"] = "integer"
    given.clear()
    assert schema.rule == rule
    assert schema == JSONSchema('{"type": "object", "properties": {"a": {"type":"string"}}}')
    assert schema.schema == {"type": "object", "properties": {"a": {"type": "string"}}}


def test_the_order_of_properties_is_part_of_a_schema() -> None:
    one, other = ({"properties": dict.fromkeys(keys, True)} for keys in ("ab", "ba"))
    assert one == other
    assert JSONSchema(one) != JSONSchema(other)


def test_choices_are_any_texts() -> None:
    assert Choice(each for each in ("a", "b")) == Choice(["a", "b"])  # type: ignore[arg-type]


endless: dict[str, Any] = {"type": "array"}
endless["items"] = endless
deep: dict[str, Any] = {}
for _ in range(200):
    deep = {"items": deep}
S = {"type": "string"}
NEVER = {"$defs": {"a": {"type": "object", "required": ["x"], "properties": {"x": {}}}}}
NEVER["$defs"]["a"]["properties"] = {"x": {"$ref": "#/$defs/a"}}


# A schema, and how the error begins behind "constraint: ".
SCHEMA_ERRORS: list[tuple[Any, str]] = [
    (3, "must be a JSON schema"),
    ([], "must be a JSON schema"),
    ("[1]", "must be a JSON schema"),
    ('{"type": ', "is text that is no JSON"),
    ('{"const": NaN}', "is text that is no JSON: JSON has no NaN"),
    ("[" * 100_000, "is text that is no JSON"),
    ({1: 2}, "the key 1 is no string"),
    ({"properties": {"a": {2: 1}}}, "properties.a: the key 2 is no string"),
    ({"const": math.nan}, "const: JSON has no nan"),
    ({"const": math.inf}, "const: JSON has no inf"),
    ({"const": {1, 2}}, "const: JSON has no form for"),
    ({"const": b"x"}, "const: JSON has no form for b'x'"),
    ({"const": "\ud800"}, "is not valid Unicode text"),
    (endless, "is nested deeper than 100 levels, or in itself"),
    (deep, "is nested deeper than 100 levels"),
    ({"enum": [0] * 70_000}, "has more than 65536 values in it"),
    ({"type": "strin"}, "type: must be of null, boolean"),
    ({"type": ["string", 3]}, "type: must be of null"),
    ({"type": []}, "type: must not be empty"),
    ({"type": None}, "type: must be of null"),
    ({"enum": []}, "enum: must be a list of values that is not empty"),
    ({"enum": "ab"}, "enum: must be a list of values"),
    ({"enum": [{"a": ["\x01"]}]}, "enum[0].a[0]: the control character '\\x01'"),
    ({"enum": [2**60]}, "enum[0]: 1152921504606846976 is too large or too fine"),
    ({"const": 1e-9}, "const: 1e-09 is too large or too fine"),
    ({"properties": {"\x00": True}}, "properties['\\x00']: the control character"),
    ({"properties": {"a": 3}}, "properties.a: a schema is an object or a boolean, not 3"),
    ({"properties": []}, "properties: must be an object of schemas"),
    ({"required": "a"}, "required: must be a list of strings"),
    ({"required": [1]}, "required: must be a list of strings"),
    (
        {"properties": {"a b": {"minimun": 1}}},
        "properties['a b'].minimun: there is no such keyword",
    ),
    ({"minimum": "1"}, "minimum: must be a number, not '1'"),
    ({"exclusiveMinimum": True}, "exclusiveMinimum: must be a number, not True"),
    ({"minimum": 10**20}, "minimum: 100000000000000000000 is too large"),
    ({"minimum": 3, "maximum": 2}, "nothing satisfies it: minimum is above maximum"),
    (
        {"items": {"minLength": 3, "maxLength": 2}},
        "items: nothing satisfies it: minLength is above",
    ),
    ({"minItems": 3, "maxItems": 2}, "nothing satisfies it: minItems is above maxItems"),
    ({"minProperties": 3, "maxProperties": 2}, "nothing satisfies it: minProperties is above"),
    ({"required": ["a", "b"], "maxProperties": 1}, "maxProperties: is below the number"),
    ({"minProperties": 2}, "minProperties: can be enforced up to one more than 'required'"),
    ({"minItems": -1}, "minItems: must be an integer, 0 or more"),
    ({"maxLength": 1.5}, "maxLength: must be an integer"),
    ({"maxItems": 10**9}, "maxItems: must be at most 4096"),
    ({"minLength": 10**9}, "minLength: must be at most 1000000"),
    ({"multipleOf": 0}, "multipleOf: must be above 0"),
    ({"multipleOf": 1e6 + 3}, "multipleOf: must be above 0, and no more than 1000"),
    (
        {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        "allOf[1].multipleOf: cannot be enforced beside the others",
    ),
    ({"pattern": 3}, "pattern: must be a regular expression, not 3"),
    ({"pattern": "a(?=b)"}, "pattern: the lookahead '(?=' in"),
    ({"pattern": "(?<!b)a"}, "pattern: the lookbehind '(?<!' in"),
    ({"pattern": r"\ba"}, r"pattern: the word boundary '\\b' in"),
    ({"pattern": r"(a)\1"}, r"pattern: the backreference '\\1' in"),
    ({"pattern": "a{2000}"}, "pattern: demands text of more than 1000"),
    ({"pattern": "x" * 5000}, "pattern: has 5000 characters"),
    (
        {"patternProperties": {r"^\w$": True}, "additionalProperties": S},
        r"patternProperties['^\\w$']: the letters of \w and the digits of \d",
    ),
    (
        {"patternProperties": {r"\d": True}, "properties": {"é": True}},
        r"patternProperties['\\d']: the letters of \w and the digits of \d",
    ),
    ({"patternProperties": {"(?!a)": True}}, "patternProperties['(?!a)']: the lookahead"),
    ({"type": "string", "format": "regex"}, "format: 'regex' cannot be enforced; byte, date"),
    ({"format": 3}, "format: must be a string"),
    ({"uniqueItems": True}, "uniqueItems: cannot be enforced"),
    ({"uniqueItems": 1}, "uniqueItems: must be true or false"),
    ({"not": {}}, "not: cannot be enforced; say what is allowed"),
    ({"if": {}, "then": {}}, "if: cannot be enforced; write the alternatives with 'anyOf'"),
    ({"contains": S}, "contains: cannot be enforced"),
    ({"dependentRequired": {}}, "dependentRequired: cannot be enforced"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties: cannot be enforced; use"),
    ({"$dynamicRef": "#a"}, "$dynamicRef: cannot be enforced; use '$ref'"),
    ({"propertyNames": {"not": {}}}, "propertyNames.not: cannot be enforced"),
    ({"propertyNames": {"anyOf": [S]}}, "propertyNames: can be enforced by 'pattern', 'enum'"),
    (
        {"properties": {"a": S}, "propertyNames": {"maxLength": 3}},
        "propertyNames: cannot be enforced beside 'properties'",
    ),
    ({"anyOf": []}, "anyOf: must be a list of schemas"),
    ({"anyOf": [S, 3]}, "anyOf[1]: a schema is an object or a boolean"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf: alternatives 0 and 1 may"),
    ({"oneOf": [S, {"type": "null"}, {"maxLength": 3}]}, "oneOf: alternatives 0 and 2 may"),
    ({"oneOf": [S] * 200}, "oneOf: has 200 alternatives"),
    ({"$ref": "#/$defs/a"}, "$ref: '#/$defs/a' refers to nothing"),
    ({"$ref": "other.json"}, "$ref: must be a place in the schema, as '#/$defs/name'"),
    ({"$ref": 3}, "$ref: must be a place in the schema"),
    ({"items": {"$id": "x"}}, "items.$id: cannot be enforced below the top"),
    ({"required": ["a"], "properties": {"a": False}}, "properties.a: is required, but nothing"),
    (False, "nothing satisfies it"),
    ({"$ref": "#"}, "nothing satisfies it: it is false, or refers to itself without an end"),
    ({**NEVER, "$ref": "#/$defs/a"}, "nothing satisfies it"),
    ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "nothing satisfies it"),
    ({"properties": {f"{n}": True for n in range(500)}}, "properties: has 500 in it that are not"),
    ({"properties": {f"{n}": True for n in range(2000)}}, "properties: has 2000 in it"),
    ({"patternProperties": {f"^{n}": True for n in range(40)}}, "patternProperties: has 40"),
    ({"anyOf": [{"items": {}}] * 3_000}, "has more than 4096 schemas in it"),
]


@pytest.mark.parametrize(("schema", "begins"), SCHEMA_ERRORS, ids=lambda value: f"{value!s:.60}")
def test_what_is_no_schema_or_cannot_be_enforced_is_refused_with_its_place(
    schema: Any, begins: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"^constraint: {re.escape(begins)}") as caught:
        JSONSchema(schema)
    assert caught.value.option == "constraint"
    assert len(str(caught.value)) < 400


OTHER_ERRORS: list[tuple[Any, str]] = [
    (lambda: Regex(3), "a regular expression is text"),  # type: ignore[arg-type]
    (lambda: Regex(""), "a regular expression must not be empty"),
    (lambda: Regex("a\\"), "ends with half of an escape"),
    (lambda: Regex("\\\\\\"), "ends with half of an escape"),
    (lambda: Regex("(?=a)"), "the lookahead"),
    (lambda: Regex("a" * 9000), "has 9000 characters"),
    (lambda: Regex("(a{1000}){1000}"), "demands text of more than 1000 characters"),
    (lambda: Regex("\udfff"), "is not valid Unicode text"),
    (lambda: Grammar(b"start: "), "a grammar is text"),  # type: ignore[arg-type]
    (lambda: Grammar(""), "a grammar needs a rule 'start'"),
    (lambda: Grammar('a: "start: b"'), "a grammar needs a rule 'start'"),
    (lambda: Grammar("// start: x"), "a grammar needs a rule 'start'"),
    (lambda: Grammar('start: "a"\n' * 9_000), "has 99000 characters"),
    (lambda: Grammar("start: A & B\nA: /a/\nB: /a*/"), "'&' between terminals"),
    (lambda: Grammar("start: A\nA: ~/a/"), "'~' between terminals"),
    (lambda: Grammar('start: A\nA: ("a"?){5000}'), "A: demands about 5000 characters"),
    (lambda: Grammar('start: B\nA: "a"{50}\nB: A~50..60'), "B: demands about 2500"),
    (lambda: Grammar("start: /a{9}{9}{99}/"), "start: demands about"),
    (lambda: Grammar('start: %json {"not": {}}'), "not: cannot be enforced"),
    (lambda: Grammar("start: %json {"), "%json is not followed by JSON"),
    (lambda: Choice("yes"), "must be a list of texts"),
    (lambda: Choice(3), "must be a list of texts"),  # type: ignore[arg-type]
    (lambda: Choice([]), "a choice needs one text at least"),
    (lambda: Choice(["a", ""]), "options[1]: must be text, and not empty"),
    (lambda: Choice(["a", 1]), "options[1]: must be text"),  # type: ignore[list-item]
    (lambda: Choice(["a", "b", "a"]), "options: 'a' is there twice"),
    (lambda: Choice(["\ud800"]), "is not valid Unicode text"),
    (lambda: SamplingParams(constraint={"type": "object"}), "must be JSONSchema(...), Regex"),  # type: ignore[arg-type]
    (lambda: SamplingParams(constraint=Regex), "must be JSONSchema(...), Regex"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "begins"), OTHER_ERRORS, ids=[each for _, each in OTHER_ERRORS])
def test_bad_values_are_refused(make: Any, begins: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^constraint: {re.escape(begins)}"):
        make()


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"const": 1}, {"const": 2}, {"const": "1"}, {"const": None}]},
        {"oneOf": [{"enum": [1, 2]}, {"enum": [3]}, {"type": "object"}]},
        {
            "$defs": {
                name: {"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]}
                for name in ("a", "b")
            },
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "discriminator": {"propertyName": "k"},
        },
        {
            "oneOf": [
                {"type": "object", "properties": {"a": S}, "required": ["a"]},
                {"type": "object", "properties": {"b": S}, "additionalProperties": False},
            ]
        },
        {"oneOf": [{"anyOf": [S, {"type": "null"}]}, {"allOf": [{"type": "integer"}]}]},
    ],
)
def test_alternatives_that_cannot_meet_are_told_apart(schema: Any) -> None:
    assert "oneOf" not in JSONSchema(schema).rule


@pytest.mark.parametrize(
    "given",
    [
        ["JSONSchema", {"schema": '{"not": {}}'}],
        ["JSONSchema", {}],
        ["JSONSchema", {"schema": "{}", "text": "{}"}],
        ["DraftModel", {"model": "x"}],
        ["Regex", ["a"]],
        [["Regex"], {"pattern": "a"}],
        ["Regex"],
        "Regex",
        {"pattern": "a"},
        ["Choice", {"options": ["x" * 300_000]}],
        ["Choice", {"options": [f"{n}" for n in range(5_000)]}],
    ],
)
def test_what_a_stranger_sends_as_one_is_refused(given: Any) -> None:
    message = Generate(1, "a", None, {"constraint": given}, 0, None, None, False, False, "")
    with pytest.raises(InvalidRequest, match=r"^constraint: "):
        request_from_wire(message, trusted=False, limits=DEFAULT_LIMITS)


def test_all_schemas_are_taken() -> None:
    assert len(SCHEMAS) >= 60
    for schema in SCHEMAS.values():
        assert "x-guidance" in JSONSchema(schema).rule
