"""JSON schemas: each keyword is enforced exactly as it stands, or refused with its place.

What comes out is another schema, for llguidance: without what is there for readers only, with
``oneOf`` as ``anyOf`` where no value satisfies two alternatives, formats as patterns, and every
reference to one list of definitions. JSON is written by it as Python's ``json.dumps`` does, with
one blank behind a comma and a colon and nowhere else: white space could go on for ever, and what
is no choice need not be sampled. Keys come in the order of the schema.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.grammars.endless import endless
from mlx_engine.grammars.json_values import check_text, dumped
from mlx_engine.grammars.keywords import NOTES, REFUSED, meant
from mlx_engine.grammars.overlap import Overlap
from mlx_engine.grammars.pattern import MOST_DEMANDED, lettered, nullable
from mlx_engine.grammars.plain_keywords import PLAIN, checked_pattern
from mlx_engine.grammars.problem import Place, problem

MOST_SCHEMAS = 4_096  # in one, with what it refers to
MOST_OPTIONAL = 400  # properties of one object
MOST_PROPERTIES = 1_000
MOST_PATTERNS = 32
MOST_DEFINITIONS = 500
MOST_MULTIPLE, MOST_MULTIPLES = 10_000, 32
MOST_COMPARED = 128  # alternatives of oneOf

# How JSON is written; an escape by number would hide a key from the rules for it.
STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}

Schema = dict[str, Any] | bool


def enforceable(schema: Any) -> str:
    """The text of a schema that allows the same, and is enforced as it stands.

    Args:
        schema: in Python's own types, which JSON has.

    Raises:
        InvalidRequest: it is no schema, nothing satisfies it, or it has a keyword in it that
            cannot be enforced: the error tells its place.
    """
    reader = _Reader(schema)
    root = reader.read(schema, ())
    definitions = reader.definitions()
    if endless(root, definitions):
        raise problem((), "nothing satisfies it: it is false, or refers to itself without an end")
    if isinstance(root, bool):
        return dumped({"x-guidance": STYLE})
    more: dict[str, Any] = {"$defs": definitions} if definitions else {}
    return dumped({"x-guidance": STYLE, **more, **root})


class _Reader:
    """The walk through one schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[Place, str] = {}  # of what is referred to
        self._read: dict[str, Schema] = {}
        self._schemas = 0
        self._multiples: list[Fraction] = []
        self._alternatives: list[tuple[Place, list[Schema]]] = []  # of oneOf

    def definitions(self) -> dict[str, Schema]:
        """All that is referred to, read; alternatives are compared once it is."""
        while len(self._read) < len(self._names):
            place, name = [*self._names.items()][len(self._read)]
            self._read[name] = {}
            found = self.read(_at(self._root, place), place)
            note = {"$comment": ".".join(map(str, place))}
            self._read[name] = {**note, **found} if isinstance(found, dict) else found
        overlap = Overlap(self._read)
        for place, choices in self._alternatives:
            for second, later in enumerate(choices):
                for first, earlier in enumerate(choices[:second]):
                    if not overlap.apart(earlier, later):
                        raise problem(
                            place,
                            f"alternatives {first} and {second} may allow the same value; give "
                            "them a required property with different constants, or use 'anyOf'",
                        )
        return self._read

    def read(self, schema: Any, place: Place) -> Schema:
        """One schema at its place."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise problem(place, f"a schema is an object or a boolean, not {shown(schema)}")
        self._schemas += 1
        if self._schemas > MOST_SCHEMAS:
            raise problem((), f"has more than {MOST_SCHEMAS} schemas in it")
        out: dict[str, Any] = {}
        for keyword, value in schema.items():
            here = (*place, keyword)
            if keyword in PLAIN:
                PLAIN[keyword](out, value, here, schema)
            elif keyword in _APPLIED:
                _APPLIED[keyword](self, out, value, here, schema)
            elif keyword in REFUSED:
                raise problem(here, f"cannot be enforced; {REFUSED[keyword]}")
            elif keyword in ("$id", "id"):
                if place and isinstance(value, str):
                    raise problem(here, "cannot be enforced below the top; leave it out")
            elif keyword not in NOTES and (known := meant(keyword)):
                raise problem(here, f"there is no such keyword; did you mean {known!r}?")
        _check_together(out, place)
        if "multipleOf" in out:
            self._check_multiples(out["multipleOf"], (*place, "multipleOf"))
        return out

    def _check_multiples(self, value: int | float, here: Place) -> None:
        """See that a number that is to be several multiples at once would not be a giant."""
        self._multiples.append(Fraction(repr(value)))
        whole = math.lcm(*(each.denominator for each in self._multiples))
        digits = {int(each * whole) for each in self._multiples}
        if math.lcm(*digits) > MOST_MULTIPLE or len(self._multiples) > MOST_MULTIPLES:
            raise problem(
                here,
                f"cannot be enforced beside the others: their least common multiple must be at "
                f"most {MOST_MULTIPLE}, and {MOST_MULTIPLES} are the most",
            )

    def read_all(self, value: Any, place: Place) -> list[Schema]:
        """A list of schemas that is not empty."""
        if not isinstance(value, list) or not value:
            raise problem(place, f"must be a list of schemas, not {shown(value)}")
        return [self.read(each, (*place, number)) for number, each in enumerate(value)]

    def read_members(self, value: Any, place: Place, most: int) -> dict[str, Schema]:
        """Schemas by name."""
        if not isinstance(value, dict):
            raise problem(place, f"must be an object of schemas, not {shown(value)}")
        if len(value) > most:
            raise problem(place, f"has {len(value)} in it; {most} are the most")
        return {key: self.read(each, (*place, key)) for key, each in value.items()}

    def one_of(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        choices = self.read_all(value, here)
        if len(choices) > MOST_COMPARED:
            raise problem(here, f"has {len(choices)} alternatives; {MOST_COMPARED} are the most")
        self._alternatives.append((here, choices))
        _choose(out, choices)

    def any_of(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        _choose(out, self.read_all(value, here))

    def all_of(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        out.setdefault("allOf", []).extend(self.read_all(value, here))

    def properties(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        out["properties"] = self.read_members(value, here, MOST_PROPERTIES)
        for key in out["properties"]:
            check_text((*here, key), key)

    def patterns(self, out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
        members = self.read_members(value, here, MOST_PATTERNS)
        rest = schema.get("additionalProperties", True)
        named = [*schema.get("properties", ()), *schema.get("required", ())]
        told = isinstance(rest, bool) and all(str(each).isascii() for each in named)
        for key in members:
            if lettered(key) and not told:
                raise problem(
                    (*here, key),
                    r"the letters of \w and the digits of \d are not everybody's, and names "
                    "have other schemas; write [A-Za-z0-9_] and the like",
                )
        if members:
            out["patternProperties"] = {
                checked_pattern(key, (*here, key), wide=rest is not False): each
                for key, each in members.items()
            }

    def others(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        out.setdefault("additionalProperties", self.read(value, here))

    def names(self, out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
        names = self.read(value, here)
        if isinstance(names, dict) and names.get("type") == "string":
            names = {key: each for key, each in names.items() if key != "type"}
        if names in (True, {}):
            return
        rest = self.read(schema.get("additionalProperties", True), here[:-1])
        keys = None if isinstance(names, bool) else names.get("enum", [names.get("const")])
        if schema.keys() & {"properties", "patternProperties"} or "allOf" in out:
            raise problem(here, "cannot be enforced beside 'properties'; name them there")
        if names is False:
            keys = []
        elif isinstance(names, dict) and names.keys() == {"pattern"}:
            out["patternProperties"] = {names["pattern"]: rest}
        elif isinstance(names, dict) and names.keys() <= {"minLength", "maxLength"}:
            low, high = names.get("minLength", 0), names.get("maxLength", "")
            out["patternProperties"] = {rf"^(?s:.{{{low},{high}}})$": rest}
        elif not (isinstance(names, dict) and names.keys() in ({"enum"}, {"const"})):
            raise problem(here, "can be enforced by 'pattern', 'enum' or lengths alone")
        if "patternProperties" not in out:
            out["properties"] = {key: rest for key in keys or () if isinstance(key, str)}
        out["additionalProperties"] = False

    def items(self, out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
        if isinstance(value, list):  # drafts before 2020
            out["prefixItems"] = self.read_all(value, here) if value else []
            if "additionalItems" in schema:
                out["items"] = self.read(schema["additionalItems"], (*here[:-1], "additionalItems"))
        else:
            out["items"] = self.read(value, here)

    def first_items(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        out["prefixItems"] = self.read_all(value, here)

    def refer(self, out: dict[str, Any], value: Any, here: Place, _: Any) -> None:
        place = _pointed(value, here)
        try:
            _at(self._root, place)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise problem(here, f"{shown(value)} refers to nothing") from error
        name = self._names.setdefault(place, str(len(self._names)))
        if len(self._names) > MOST_DEFINITIONS:
            raise problem(here, f"refers to more than {MOST_DEFINITIONS} places")
        out["$ref"] = f"#/$defs/{name}"


_APPLIED: dict[str, Callable[[_Reader, dict[str, Any], Any, Place, Any], None]] = {
    "anyOf": _Reader.any_of,
    "allOf": _Reader.all_of,
    "oneOf": _Reader.one_of,
    "$ref": _Reader.refer,
    "properties": _Reader.properties,
    "patternProperties": _Reader.patterns,
    "additionalProperties": _Reader.others,
    "propertyNames": _Reader.names,
    "items": _Reader.items,
    "prefixItems": _Reader.first_items,
}


def _choose(out: dict[str, Any], choices: list[Schema]) -> None:
    if "anyOf" in out:
        out.setdefault("allOf", []).append({"anyOf": choices})
    else:
        out["anyOf"] = choices


def _check_together(out: dict[str, Any], place: Place) -> None:
    """See that the keywords of one schema do not exclude each other."""
    for least, most in (
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
    ):
        if least in out and most in out and out[least] > out[most]:
            raise problem(place, f"nothing satisfies it: {least} is above {most}")
    if "pattern" in out and out.get("minLength", 0) > MOST_DEMANDED:
        raise problem((*place, "minLength"), f"must be at most {MOST_DEMANDED} beside a pattern")
    if nullable(out.get("pattern", ".")):
        # Whether patterns exclude each other is found out in bounds where none allows no text.
        also = {"anyOf": [{"const": ""}, {"minLength": 1}]}
        if out.get("minLength", 0) == 0 and out.get("maxLength", 1) > 0:
            out.setdefault("allOf", []).append(also)
    required, known = out.get("required", []), out.get("properties", {})
    for key in required:
        if known.get(key) is False:
            raise problem((*place, "properties", key), "is required, but nothing satisfies it")
    optional = len(known.keys() - set(required))
    if optional > MOST_OPTIONAL:
        raise problem(
            (*place, "properties"),
            f"has {optional} in it that are not required; {MOST_OPTIONAL} are the most",
        )
    # Keys that are not declared may come twice, and count once.
    if out.get("minProperties", 0) > len(required) + 1:
        raise problem((*place, "minProperties"), "can be enforced up to one more than 'required'")
    if out.get("maxProperties", len(required)) < len(required):
        raise problem((*place, "maxProperties"), "is below the number of required properties")


def _pointed(value: Any, here: Place) -> Place:
    """The place that a reference names."""
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
        raise problem(here, f"must be a place in the schema, as '#/$defs/name', not {shown(value)}")
    steps = urllib.parse.unquote(value[1:]).split("/")[1:]
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def _at(root: Any, place: Place) -> Any:
    for step in place:
        root = root[int(step)] if isinstance(root, list) else root[step]
    return root
