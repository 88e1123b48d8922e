"""Problems that a compiler has with a grammar, in words, and the place in a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from mlx_engine.grammars.problem import Place, named

_LONGEST = 300  # characters of a text
_MOST_TRIED = 200  # parts of a schema
_POSITION = re.compile(r"^(?:at )?\d+\(\d+\): ")
_SHOWN = re.compile(r"^\s*\d+ \| ?(.*)$")
_SCHEMA = re.compile(r"%json (?=\{)")
_MARKS = re.compile(r"^[\s^]*$")
_READ = json.JSONDecoder()
_LISTS = ("anyOf", "allOf", "prefixItems")
_OBJECTS = ("$defs", "properties", "patternProperties")
_SINGLE = ("additionalProperties", "items")


def explained(lark: str, error: str, limits: LLParserLimits) -> str:
    """The problem of a grammar that does not compile, in words.

    Args:
        lark: the grammar.
        error: what the compiler says.
        limits: those it is compiled with.
    """
    for start in _SCHEMA.finditer(lark):
        try:
            schema, _ = _READ.raw_decode(lark, start.end())
        except ValueError:
            continue
        finder = _Finder(schema, limits)
        if (found := finder.failure(schema)) is not None:
            place, problem = finder.innermost(schema, (), found)
            return f"{named(place)}: {problem}" if place else problem
    return _told(error)


class _Finder:
    """The search for the part of a schema that does not compile."""

    def __init__(self, root: dict[str, Any], limits: LLParserLimits) -> None:
        self._shared = {key: root[key] for key in ("x-guidance", "$defs") if key in root}
        self._limits = limits
        self._left = _MOST_TRIED

    def failure(self, schema: Any) -> str | None:
        """The compiler's word on one part; ``None`` if it takes it."""
        self._left -= 1
        whole = {**self._shared, **schema} if isinstance(schema, dict) else schema
        lark = LLMatcher.grammar_from_lark(f"start: %json {json.dumps(whole)}")
        bad, told = LLMatcher.validate_grammar_with_warnings(lark, limits=self._limits)
        return _told(told[0]) if bad or told else None

    def innermost(self, schema: Any, place: Place, failure: str) -> tuple[Place, str]:
        """The smallest part that fails as a whole, and why."""
        for step, part in _parts(schema):
            if self._left <= 0:
                break
            if isinstance(part, dict) and (found := self.failure(part)) is not None:
                inside = (
                    tuple(part["$comment"].split(".")) if "$comment" in part else (*place, *step)
                )
                return self.innermost(part, inside, found)
        return place, failure


def _parts(schema: Any) -> Iterator[tuple[Place, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _LISTS:
        for number, part in enumerate(schema.get(key, ())):
            yield (key, number), part
    for key in _OBJECTS:
        for name, part in schema.get(key, {}).items():
            yield (key, name), part
    for key in _SINGLE:
        if key in schema:
            yield (key,), schema[key]


def _told(error: str) -> str:
    """The compiler's text in one line."""
    lines, last, near = list[str](), "", ""
    for line in error.splitlines():
        if shown := _SHOWN.match(line):
            last = shown[1].strip()
        elif _MARKS.match(line):
            near = near or ("^" in line and last) or ""
        elif not line.startswith("<"):
            lines.append(line.strip())
    text = _POSITION.sub("", " ".join(lines))
    text = re.sub(r"^failed to compile JSON schema: ", "", text)
    text = re.sub(r"^Unsatisfiable schema: ", "nothing satisfies it: ", text)
    if near and "%json" not in near:
        text += f", at {near[:80]!r}"
    return text[:_LONGEST] or "it does not compile"
