"""Constraints on what a model may answer. Only values: nothing is compiled here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.grammars.json_schema import enforceable
from mlx_engine.grammars.json_values import copied, dumped, from_text
from mlx_engine.grammars.lark import checked_lark, slashed
from mlx_engine.grammars.pattern import checked_regex, literally
from mlx_engine.grammars.problem import problem


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """JSON that a schema allows, as ``json.dumps`` writes it: a blank behind ``,`` and ``:`` alone.

    Keys come in the order of the schema. Every keyword is enforced, or refused with its place:
    ``not``, ``if``, ``contains``, ``uniqueItems``, ``oneOf`` of alternatives that may allow the
    same value, formats and patterns that no automaton has. What only describes is ignored.

    Attributes:
        schema: a JSON schema (draft 2020-12, or of what was before it), or its text; ``True``
            allows any JSON. It is copied.
        text: the schema as JSON.

    Raises:
        InvalidRequest: it is not one, cannot be enforced, or nothing satisfies it; the error
            tells the place.
    """

    schema: Mapping[str, Any] | bool | str = field(compare=False)
    text: str = field(init=False, repr=False)
    rule: str = field(init=False, repr=False, compare=False)
    """The right-hand side of a rule in a Lark grammar, as llguidance reads them."""

    def __post_init__(self) -> None:
        given = from_text(self.schema) if isinstance(self.schema, str) else self.schema
        if not isinstance(given, Mapping | bool):
            raise problem((), f"must be a JSON schema, as {{'type': 'object'}}, not {shown(given)}")
        schema = copied(given)
        object.__setattr__(self, "schema", schema)
        object.__setattr__(self, "text", dumped(schema))
        object.__setattr__(self, "rule", f"%json {enforceable(schema)}")


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches as a whole.

    Attributes:
        pattern: in the syntax of Rust's ``regex`` crate: without lookarounds, word boundaries
            and backreferences. It may repeat without an end, but demand no more than 1,000
            characters by its counts.

    Raises:
        InvalidRequest: it is none of those.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise problem((), f"a regular expression is text, not {shown(self.pattern)}")
        object.__setattr__(self, "pattern", checked_regex(str(self.pattern)))

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return slashed(self.pattern)


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a context-free grammar.

    Attributes:
        lark: the grammar, in llguidance's variant of Lark, with a rule ``start``. Schemas in it,
            by ``%json``, are enforced as those of ``JSONSchema``.

    Raises:
        InvalidRequest: it is none, or too large.
    """

    lark: str
    rule: str = field(init=False, repr=False, compare=False)
    """See ``JSONSchema.rule``."""

    def __post_init__(self) -> None:
        if not isinstance(self.lark, str):
            raise problem((), f"a grammar is text, not {shown(self.lark)}")
        object.__setattr__(self, "lark", str(self.lark))
        object.__setattr__(self, "rule", f"%lark {{\n{checked_lark(self.lark)}\n}}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some texts.

    Attributes:
        options: the texts: none empty, none twice.

    Raises:
        InvalidRequest: there are none, or others than that.
    """

    options: Sequence[str]

    def __post_init__(self) -> None:
        given = self.options
        if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
            raise problem(
                (), f"must be a list of texts, as Choice(['yes', 'no']), not {shown(given)}"
            )
        options = tuple(given)
        if not options:
            raise problem((), "a choice needs one text at least")
        for place, option in enumerate(options):
            if not isinstance(option, str) or not option:
                raise problem(("options", place), f"must be text, and not empty: {shown(option)}")
        if len(set(options)) < len(options):
            twice, _ = Counter(options).most_common(1)[0]
            raise problem(("options",), f"{shown(twice)} is there twice")
        texts = tuple(str(each) for each in options)
        dumped(texts)
        object.__setattr__(self, "options", texts)

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return slashed("|".join(map(literally, self.options)))


@dataclass(frozen=True, slots=True)
class AnyJSON:
    """Any JSON object, written as ``JSONSchema`` says."""

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return f"%json {enforceable({'type': 'object'})}"


Constraint = JSONSchema | Regex | Grammar | Choice | AnyJSON


def checked_constraint(name: str, value: object) -> Constraint | None:
    """``value``, if it is a constraint or ``None``.

    Raises:
        InvalidRequest: it is not.
    """
    if value is not None and not isinstance(value, Constraint):
        raise InvalidRequest(
            name,
            "must be JSONSchema(...), Regex(...), Grammar(...), Choice(...) or AnyJSON(), "
            f"not {shown(value)}",
        )
    return value


def characters_of(constraint: Constraint) -> int:
    """Characters of a constraint's text; of a schema, as JSON."""
    match constraint:
        case JSONSchema():
            return len(constraint.text)
        case Regex():
            return len(constraint.pattern)
        case Grammar():
            return len(constraint.lark)
        case Choice():
            return sum(map(len, constraint.options))
    return 0
