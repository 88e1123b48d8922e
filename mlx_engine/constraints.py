"""Constraints on what a model may answer. Only values: nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """JSON that a schema allows.

    Attributes:
        schema: a JSON schema, or its text; ``True`` allows any JSON. It is copied.
        text: the schema as JSON.

    Raises:
        InvalidRequest: it is not one, or not JSON.
    """

    schema: Mapping[str, Any] | bool | str = field(compare=False)
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        schema = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
        if not isinstance(schema, Mapping | bool):
            raise InvalidRequest("constraint", f"must be a JSON schema, not {shown(self.schema)}")
        object.__setattr__(self, "text", json.dumps(schema))
        object.__setattr__(self, "schema", json.loads(self.text))

    @property
    def rule(self) -> str:
        """The right-hand side of a rule in a Lark grammar, as llguidance reads them."""
        return f"%json {self.text}"


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches as a whole.

    Attributes:
        pattern: in the syntax of Rust's ``regex`` crate.
    """

    pattern: str

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return f"/{self.pattern}/"


@dataclass(frozen=True, slots=True)
class Grammar:
    """Text of a context-free grammar.

    Attributes:
        lark: the grammar, in llguidance's variant of Lark.
    """

    lark: str

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return f"%lark {{\n{self.lark}\n}}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some texts.

    Attributes:
        options: the texts.
    """

    options: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return " | ".join(json.dumps(each, ensure_ascii=False) for each in self.options)


@dataclass(frozen=True, slots=True)
class AnyJSON:
    """Any JSON object."""

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return '%json {"type": "object"}'


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
