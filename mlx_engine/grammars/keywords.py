"""The keywords of JSON Schema: those that say nothing of values, and those not enforced."""

from __future__ import annotations

import difflib

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

ENFORCED = (
    *("type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref"),
    *("properties", "patternProperties", "additionalProperties", "required", "propertyNames"),
    *("minProperties", "maxProperties"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)

# What is there for readers and tools; those behind the third line are not JSON Schema's.
NOTES = frozenset((
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$comment", "$defs", "definitions", "$anchor", "$vocabulary"),
    "additionalItems",  # of items, which looks at it
    *("contentMediaType", "contentEncoding", "contentSchema"),
    *("example", "nullable", "discriminator", "xml", "externalDocs", "strict"),
    *("markdownDescription", "enumDescriptions", "enumNames", "errorMessage", "order"),
))  # fmt: skip

_BRANCH = "write the alternatives with 'anyOf'"
_COUNTED = "say what an item is with 'items', or give places with 'prefixItems'"
REFUSED = {
    "not": "say what is allowed instead",
    "if": _BRANCH,
    "then": _BRANCH,
    "else": _BRANCH,
    "dependentRequired": _BRANCH,
    "dependentSchemas": _BRANCH,
    "dependencies": _BRANCH,
    "contains": _COUNTED,
    "minContains": _COUNTED,
    "maxContains": _COUNTED,
    "unevaluatedItems": "use 'items'",
    "unevaluatedProperties": "use 'additionalProperties'",
    "$dynamicRef": "use '$ref'",
    "$dynamicAnchor": "use '$ref'",
    "$recursiveRef": "use '$ref'",
    "$recursiveAnchor": "use '$ref'",
}


def meant(keyword: str) -> str | None:
    """The keyword that an unknown one nearly is; ``None`` if it may be a note of somebody's."""
    found = difflib.get_close_matches(keyword[:64], (*ENFORCED, *REFUSED), n=1, cutoff=0.85)
    return found[0] if found else None
