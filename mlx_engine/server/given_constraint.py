"""The form that an answer is to have, by the fields of OpenAI's API and by those of other servers.

A form that cannot be had is refused: an answer without it would be taken for one that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.constraints import AnyJSON, Choice, Constraint, JSONSchema, Regex
from mlx_engine.errors import InvalidRequest
from mlx_engine.server.asked import Fields

# Of vLLM, within ``structured_outputs``, or behind ``guided_``.
_FORMS: dict[str, Callable[[Any], Constraint]] = {
    "json": JSONSchema,
    "regex": Regex,
    "choice": Choice,
}
_NOT_HERE = ("grammar", "structural_tag")
# Fields of a body; the last one is of llama-server.
_FIELDS: dict[str, Callable[[Any], Constraint]] = {
    **{f"guided_{name}": form for name, form in _FORMS.items()},
    "json_schema": JSONSchema,
}
_REFUSED = ("guided_grammar", "grammar")


def constraint_of(fields: Fields) -> Constraint | None:
    """The constraint that a request has, if it has one.

    Raises:
        InvalidRequest: it has several, or none that could be had.
    """
    for name in _REFUSED:
        if fields.take(name):
            raise InvalidRequest(name, "is in no form that is known here; see response_format")
    found = {
        "response_format": response_format(fields.mapping("response_format")),
        "structured_outputs": _structured(fields.mapping("structured_outputs")),
    }
    for name, form in _FIELDS.items():
        if (given := fields.take(name)) is not None:
            found[name] = form(given)
    named = [name for name, constraint in found.items() if constraint is not None]
    if len(named) > 1:
        raise InvalidRequest(named[1], f"asks for one more form than {named[0]}")
    return found[named[0]] if named else None


def response_format(given: Mapping[str, Any], option: str = "response_format") -> Constraint | None:
    """The constraint that a ``response_format`` is.

    Raises:
        InvalidRequest: there is no such format.
    """
    kind = given.get("type", "text")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        known = "'text', 'json_object' and 'json_schema' are there"
        raise InvalidRequest(option, f"there is no such type; {known}")
    schema = given.get("json_schema", given)
    schema = schema.get("schema") if isinstance(schema, dict) else None
    if schema is None and kind == "json_object":
        return AnyJSON()
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(option, f"of the type {kind!r} needs a 'schema', an object")
    return JSONSchema(schema)


def _structured(given: Mapping[str, Any]) -> Constraint | None:
    """The constraint that vLLM's ``structured_outputs`` are."""
    option = "structured_outputs"
    for name in _NOT_HERE:
        if given.get(name):
            raise InvalidRequest(option, f"{shown(name)} is not there")
    found = [form(given[name]) for name, form in _FORMS.items() if given.get(name) is not None]
    if given.get("json_object"):
        found.append(AnyJSON())
    if len(found) > 1:
        raise InvalidRequest(option, "asks for more than one form")
    return found[0] if found else None
