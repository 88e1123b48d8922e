"""The application's description in OpenAPI 3.1, made of the table of fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_engine.server.api import Api
from mlx_engine.server.failures import STATUS, Kind
from mlx_engine.server.field_table import Table, quiet


def openapi(apis: Sequence[tuple[str, Api]], root: str = "") -> dict[str, Any]:
    """The description of all paths.

    Args:
        apis: by their paths, behind ``/v1``.
        root: the path at which the application is mounted.
    """
    paths: dict[str, Any] = {
        f"/v1{path}": {"post": _operation(api, events=not path.endswith("count_tokens"))}
        for path, api in apis
    }
    for path, kind, what in (
        ("/v1/models", "application/json", "Models, and whether they are loaded."),
        ("/v1/models/{model}", "application/json", "One of them."),
        ("/health", "application/json", "Whether requests can be answered: 200 or 503."),
        ("/metrics", "text/plain", "Numbers for Prometheus."),
        ("/status", "application/json", "Numbers of now, as the page at / shows them."),
    ):
        paths[path] = {"get": _question(path, kind, what)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-engine", "version": "1", "summary": "Models on this machine."},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def body_schema(table: Table) -> dict[str, Any]:
    """The JSON Schema of a request's body: other fields are allowed, and ignored."""
    properties: dict[str, Any] = {}
    for name, spec in table.items():
        said = {"quiet": "changes nothing", "refused": "refused"}.get(spec.effect, spec.note)
        properties[name] = {**spec.schema, **({"description": said} if said else {})}
    needed = next(name for name in ("messages", "input", "prompt") if name in table)
    return {"type": "object", "properties": properties, "required": [needed]}


def _question(path: str, kind: str, what: str) -> dict[str, Any]:
    """A ``GET``."""
    answers = {"200": {"description": "OK", "content": {kind: {}}}}
    named = re.findall(r"\{(\w+)\}", path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in named
    ]
    kinds: list[Kind] = ["forbidden"] if path == "/health" else ["key", "forbidden"]
    if named:
        kinds.append("not_found")
    if path == "/health":
        answers["503"] = {"description": "Not now", "content": {kind: {}}}
    return {
        "summary": what,
        "parameters": parameters,
        "responses": {**answers, **_errors(kinds)},
    }


def _errors(kinds: Iterable[Kind]) -> dict[str, Any]:
    statuses = sorted({str(STATUS[kind]) for kind in kinds})
    told = {"description": "An error, in this API's form", "content": {"application/json": {}}}
    return dict.fromkeys(statuses, told)


def _operation(api: Api, *, events: bool) -> dict[str, Any]:
    kinds: dict[str, Any] = {"application/json": {}}
    if events:
        kinds["text/event-stream"] = {}
    body = {"application/json": {"schema": body_schema(api.table)}}
    return {
        "operationId": api.name,
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": "The answer", "content": kinds},
            **_errors(STATUS),
        },
    }


def markdown(table: Table) -> str:
    """The table of fields, for the guide."""
    lines = ["| field | what becomes of it |", "| :-- | :-- |"]
    for name, spec in table.items():
        if spec.effect != "quiet":
            said = {"refused": "refused", "honoured": "honoured"}[spec.effect]
            lines.append(f"| `{name}` | {said}{': ' if spec.note else ''}{spec.note} |")
    names = ", ".join(f"`{name}`" for name in sorted(quiet(table)))
    return "\n".join(lines) + f"\n\nWithout effect here: {names}.\n"
