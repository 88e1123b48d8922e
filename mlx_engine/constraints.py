"""Constraints on what a model may answer. Only values: nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """JSON that a schema allows.

    Attributes:
        schema: a JSON schema; ``True`` allows any JSON.

    Raises:
        InvalidRequest: it is not one, or not JSON.
    """

    schema: Mapping[str, Any] | bool

    def __post_init__(self) -> None:
        if not isinstance(self.schema, Mapping | bool):
            raise InvalidRequest("constraint", f"must be a JSON schema, not {shown(self.schema)}")

    @property
    def rule(self) -> str:
        """The right-hand side of a rule in a Lark grammar, as llguidance reads them."""
        return f"%json {json.dumps(self.schema)}"


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
        return f"%regex {json.dumps(self.pattern)}"  # to be made right


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

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return " | ".join(json.dumps(each) for each in self.options)


@dataclass(frozen=True, slots=True)
class AnyJSON:
    """Any JSON object."""

    @property
    def rule(self) -> str:
        """See ``JSONSchema.rule``."""
        return '%json {"type": "object"}'


Constraint = JSONSchema | Regex | Grammar | Choice | AnyJSON
