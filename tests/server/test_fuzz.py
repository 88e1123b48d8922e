"""Bodies that nobody sends on purpose."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_engine import GenerationError
from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine, FakeRequest
from tests.server.asgi import CHAT, Client, ask

# Each API's path, and fields that make a request of any others.
APIS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}]},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "stream", "seed"),
        *("stream_options", "n", "stop", "logprobs", "top_logprobs", "logit_bias", "max_tokens"),
        *("max_completion_tokens", "temperature", "top_p", "response_format", "reasoning_effort"),
        *("chat_template_kwargs", "thinking", "max_reasoning_tokens", "continue_final_message"),
        *("stop_token_ids", "ignore_eos", "user", "metadata", "prompt", "echo", "suffix"),
    ]
)


def said(request: FakeRequest) -> str | GenerationError:
    """An answer; none to what is bound, of which the script does not know what it would be."""
    asks = request.tool_choice not in ("auto", "none") or "strict" in str(request.tools)
    bound = request.params.constraint is not None or asks
    return GenerationError("the scripted answer breaks it") if bound else "Hi."


def is_answered(reply: Client) -> bool:
    """Whether it is no failure of the server's: the script knows no constraint."""
    return reply.status in (200, 400, 404) or b"the scripted answer breaks" in reply.data


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to everything within a value."""
    keys: Any = value if isinstance(value, dict) else ()
    for key in range(len(value)) if isinstance(value, list) else keys:
        yield (*place, key)
        yield from _places(value[key], (*place, key))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.dictionaries(NAMES, VALUES, max_size=5), valid=st.booleans())
def test_no_body_is_a_failure_of_the_server(
    loop: asyncio.AbstractEventLoop, app: Any, body: dict[str, Any], valid: bool
) -> None:
    for path, needed in APIS.items():
        sent = json.dumps({**body, "max_tokens": 3, **needed} if valid else body).encode()
        reply = loop.run_until_complete(ask(app, sent, path))
        assert is_answered(reply), reply.data
        if reply.status != 200:
            assert reply.json["error"]["message"]


# Requests of which something is to be broken, at any depth.
_TOOL: dict[str, Any] = {"name": "look", "description": "Look.", "parameters": {"type": "object"}}
_CALLED = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
_FORMAT = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
WHOLE: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [_CALLED]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21"}]},
        ],
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": _FORMAT},
        "stream_options": {"include_usage": True},
        "logit_bias": {"5": 1},
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/v1/completions": {"prompt": ["Hello", [1, 2]], "n": 2, "logprobs": 1, "stop": "x"},
    "/v1/responses": {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"type": "message", "role": "user", "content": "Hello"},
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Hm."}],
                "encrypted_content": "mlx-engine:SG0u",
            },
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
            {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"},
            {"type": "function_call_output", "call_id": "c1", "output": "21"},
            {
                "type": "custom_tool_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "21"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "21"}]},
        ],
        "instructions": "Be brief.",
        "tools": [
            {"type": "function", **_TOOL},
            {"type": "custom", "name": "patch", "format": {"type": "grammar", "definition": "a"}},
            {"type": "namespace", "name": "mail", "tools": [{"type": "function", **_TOOL}]},
        ],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "look"}]},
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": _FORMAT, "verbosity": "low"},
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "mlx-engine.c"},
                    {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "21", "is_error": False}
                ],
            },
        ],
        "tools": [{"name": "look", "description": "Look.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "stop_sequences": ["x"],
        "metadata": {"user_id": "a"},
        "output_config": {"effort": "low"},
    },
}
WHOLE["/v1/messages/count_tokens"] = WHOLE["/v1/messages"]
PLACES = {path: list(_places(body)) for path, body in WHOLE.items()}


@pytest.mark.parametrize("path", WHOLE)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_nor_is_one_of_which_something_is_broken(
    loop: asyncio.AbstractEventLoop, app: Any, path: str, data: st.DataObject
) -> None:
    body = copy.deepcopy(WHOLE[path])
    for place in data.draw(st.lists(st.sampled_from(PLACES[path]), max_size=2)):
        _break(body, place, data.draw(st.none() | VALUES | NAMES))
    stream = data.draw(st.booleans())
    reply = loop.run_until_complete(ask(app, json.dumps({**body, "stream": stream}).encode(), path))
    assert is_answered(reply), reply.data
    if reply.status != 200:
        assert reply.json["error"]["message"]
        assert not stream or "event-stream" not in reply.headers["content-type"]


def test_nor_is_one_that_is_nested_deep(loop: asyncio.AbstractEventLoop, app: Any) -> None:
    inner = '{"type":"search_result","content":['
    block = inner * 900 + "]}" * 900
    sent = '{"messages":[{"role":"user","content":[' + block + "]}]}"
    reply = loop.run_until_complete(ask(app, sent.encode(), "/v1/messages"))
    assert reply.status == 400
    assert "nested too deep" in reply.json["error"]["message"]


def _break(body: Any, place: tuple[Any, ...], value: object) -> None:
    """Put something else there, if it is there still."""
    *way, last = place
    try:
        for step in way:
            body = body[step]
        body[last] = value
    except (TypeError, LookupError):
        pass


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture(scope="module")
def app(loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    engine = FakeEngine(said, max_batch_size=4, context_length=100)
    loop.run_until_complete(engine.start())
    yield create_app(engine)
    loop.run_until_complete(engine.stop())
