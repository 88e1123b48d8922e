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
    found: dict[str, Constraint] = {}
    objects = {"response_format": response_format, "structured_outputs": _structured}
    for name, form in {**objects, **_FIELDS}.items():
        given = (fields.mapping(name) or None) if name in objects else fields.take(name)
        if given is None:
            continue
        fields.form = name
        if (constraint := form(given)) is not None:
            found[name] = constraint
    if not found:
        return None
    fields.form, *others = found
    if others:
        raise InvalidRequest(others[0], f"asks for one more form than {fields.form}")
    return found[fields.form]


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
