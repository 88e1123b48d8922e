"""Requests with tools and a form of the answer: frameworks send both for an agent with a type."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from mlx_engine.constraints import AnyJSON, JSONSchema
from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest
from tests.server.asgi import CHAT, ask

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer"}},
    "required": ["total"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "How much?"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "add", "parameters": PARAMETERS}


def chat(schema: Any, choice: str) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "Sum", "schema": schema}}
    tools = [{"type": "function", "function": FUNCTION}]
    named = {"type": "function", "function": {"name": "add"}}
    return {
        "messages": MESSAGES,
        "response_format": form,
        "tools": tools,
        "tool_choice": named if choice == "named" else choice,
    }


def responses(schema: Any, choice: str) -> dict[str, Any]:
    form = {"type": "json_schema", "name": "Sum", "schema": schema}
    tools = [{"type": "function", **FUNCTION}]
    named = {"type": "function", "name": "add"}
    return {
        "input": MESSAGES,
        "text": {"format": form},
        "tools": tools,
        "tool_choice": named if choice == "named" else choice,
    }


def messages(schema: Any, choice: str) -> dict[str, Any]:
    form = {"type": "json_schema", "schema": schema}
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    named = {"type": "tool", "name": "add"}
    kinds = {"required": {"type": "any"}, "named": named}
    return {
        "messages": MESSAGES,
        "max_tokens": 50,
        "output_config": {"format": form},
        "tools": tools,
        "tool_choice": kinds.get(choice, {"type": choice}),
    }


APIS = [
    pytest.param(CHAT, chat, "response_format", id="chat"),
    pytest.param("/v1/responses", responses, "text.format", id="responses"),
    pytest.param("/v1/messages", messages, "output_config.format", id="messages"),
]


def told(request: FakeRequest) -> FakeAnswer | str:
    forced = request.tool_choice not in ("auto", "none")
    return FakeAnswer(tool_calls=[("add", {"a": 1})]) if forced else '{"total": 1}'


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(told) as engine:
        yield engine


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize(("path", "body", "field"), APIS)
async def test_a_call_that_is_asked_for_has_no_text_to_have_a_form(
    engine: FakeEngine, path: str, body: Any, field: str, choice: str, stream: bool
) -> None:
    app = create_app(engine)
    reply = await ask(app, {**body(SCHEMA, choice), "stream": stream}, path)
    assert reply.status == 200, reply.data
    (request,) = engine.requests
    assert request.params.constraint is None
    assert request.tool_choice not in ("auto", "none")
    assert request.result().tool_calls[0].arguments == {"a": 1}
    assert b'"add"' in reply.data
    assert "x-mlx-engine-ignored" not in reply.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body", "field"), APIS)
async def test_text_with_a_form_has_no_calls_which_is_said(
    engine: FakeEngine, path: str, body: Any, field: str, stream: bool
) -> None:
    reply = await ask(create_app(engine), {**body(SCHEMA, "auto"), "stream": stream}, path)
    assert reply.status == 200, reply.data
    assert isinstance(engine.requests[0].params.constraint, JSONSchema)
    assert "tools" in reply.headers["x-mlx-engine-ignored"].split(", ")


@pytest.mark.parametrize(("path", "body", "field"), APIS)
async def test_tools_that_are_not_to_be_called_are_no_matter(
    engine: FakeEngine, path: str, body: Any, field: str
) -> None:
    reply = await ask(create_app(engine), body(SCHEMA, "none"), path)
    assert reply.status == 200, reply.data
    assert isinstance(engine.requests[0].params.constraint, JSONSchema)
    assert "x-mlx-engine-ignored" not in reply.headers


@pytest.mark.parametrize("schema", [{"$ref": "#/nope"}, {"type": "integer", "multipleOf": 0}])
@pytest.mark.parametrize(("path", "body", "field"), APIS)
async def test_a_form_that_cannot_be_had_is_told_by_the_name_of_its_field(
    engine: FakeEngine, path: str, body: Any, field: str, schema: Any
) -> None:
    for stream in (False, True):
        reply = await ask(create_app(engine), {**body(schema, "auto"), "stream": stream}, path)
        assert reply.status == 400
        error = reply.json["error"]
        assert error["message"].startswith(f"{field}: ")
        assert "constraint" not in error["message"]
        assert error.get("param", field) == field


async def test_a_form_by_another_servers_field_is_told_by_that(engine: FakeEngine) -> None:
    body = {"messages": MESSAGES, "guided_json": {"$ref": "#/nope"}}
    error = (await ask(create_app(engine), body)).json["error"]
    assert error["param"] == "guided_json"
    assert error["message"].startswith("guided_json: ")


async def test_a_form_without_tools_is_as_it_was(engine: FakeEngine) -> None:
    body = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    reply = await ask(create_app(engine), body)
    assert reply.status == 200
    assert engine.requests[0].params.constraint == AnyJSON()
    assert "x-mlx-engine-ignored" not in reply.headers
