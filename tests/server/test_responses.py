"""OpenAI's responses, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_args

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from mlx_engine import AnyJSON, GenerationError, JSONSchema, ToolCall
from mlx_engine.server import create_app
from mlx_engine.server.kept import KeptItems
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest, Gate
from tests.server.asgi import Client, ask
from tests.waiting import until

pytestmark = pytest.mark.anyio

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
PATCH = {
    "type": "custom",
    "name": "patch",
    "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
}
SEND = {"type": "function", "name": "send"}
MAIL = {"type": "namespace", "name": "mail", "description": "Mail.", "tools": [SEND]}
TOOLS = [WEATHER, PATCH, MAIL, {"type": "web_search"}]
PARIS = ("weather", {"city": "Paris"})
ANSWERS: dict[str, Any] = {
    "Hello": "Hello there, Ann!",
    "Nothing": "",
    "Think": FakeAnswer("It is four.", reasoning="Two and two"),
    "Only think": FakeAnswer(reasoning="Hm."),
    "Weather?": FakeAnswer("Let me see.", reasoning="Hm.", tool_calls=[PARIS]),
    "Both?": FakeAnswer(tool_calls=[PARIS, ("weather", {"city": "Lyon"})]),
    "Patch": FakeAnswer(tool_calls=[("patch", {"input": '*** "a"\n+b'})]),
    "Send": FakeAnswer(tool_calls=[("mail__send", {"to": "Ann"})]),
    "Wrong?": FakeAnswer(tool_calls=[ToolCall("weather", {}, '{"name": "weather"', "not closed")]),
    "Wrong patch": FakeAnswer(tool_calls=[ToolCall("patch", {}, '{"name": "patch"', "not closed")]),
    "Nobody": FakeAnswer(tool_calls=[ToolCall("", {}, "<call>nobody", "no such tool")]),
    "Long": "word " * 50,
    "Json": '{"name": "Ann", "age": 3}',
    "Fail": ["One", GenerationError("out of memory")],
    "Fail at once": [GenerationError("out of memory")],
    "Sunny": "It is sunny.",
}


async def last_request(app: Any, engine: FakeEngine, body: dict[str, Any]) -> FakeRequest:
    """The engine's request for a body."""
    answer = await ask(app, {"input": "Hello", **body}, PATH)
    assert answer.status == 200, answer.json
    return engine.requests[-1]


def check_event(event: dict[str, Any]) -> None:
    """It is as the client's own types have it."""
    _EVENTS[event["type"]].model_validate(event)


_UNION, _ = get_args(ResponseStreamEvent)
_EVENTS = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(_UNION)}

# The SDK


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="fake", input="Think", instructions="Be brief.")
    assert answer.output_text == "It is four."
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.status == "completed"
    assert answer.instructions == "Be brief."
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    again = await client.responses.create(model="fake", input="Think", instructions="Be brief.")
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens > 0
    assert {again.id, *(item.id for item in again.output)}.isdisjoint(
        {answer.id, *(item.id for item in answer.output)}
    )


async def test_the_client_s_own_stream(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="fake", input="Weather?", tools=TOOLS) as stream:  # type: ignore[arg-type]
        text = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
        answer = await stream.get_final_response()
    assert text == answer.output_text == "Let me see."
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Paris"}


class Person(BaseModel):
    name: str
    age: int


async def test_structured_answers(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await client.responses.parse(model="fake", input="Json", text_format=Person)
    assert answer.output_parsed == Person(name="Ann", age=3)
    assert isinstance(engine.requests[-1].params.constraint, JSONSchema)
    form: Any = {"format": {"type": "json_object"}}
    await client.responses.create(model="fake", input="Json", text=form)
    assert engine.requests[-1].params.constraint == AnyJSON()


# Events

_MESSAGE = ["output_item.added", "content_part.added", "output_text.delta*", "output_text.done"]
_MESSAGE += ["content_part.done", "output_item.done"]
_SUMMARY = "reasoning_summary_"
_REASONING = ["output_item.added", f"{_SUMMARY}part.added", f"{_SUMMARY}text.delta*"]
_REASONING += [f"{_SUMMARY}text.done", f"{_SUMMARY}part.done", "output_item.done"]
_ARGUMENTS = "function_call_arguments"
_CALL = ["output_item.added", f"{_ARGUMENTS}.delta*", f"{_ARGUMENTS}.done", "output_item.done"]
_INPUT = "custom_tool_call_input"
_CUSTOM = ["output_item.added", f"{_INPUT}.delta*", f"{_INPUT}.done", "output_item.done"]


@pytest.mark.parametrize(
    ("said", "items"),
    [
        ("Hello", [_MESSAGE]),
        ("Nothing", [[name for name in _MESSAGE if "delta" not in name]]),
        ("Think", [_REASONING, _MESSAGE]),
        ("Only think", [_REASONING, [name for name in _MESSAGE if "delta" not in name]]),
        ("Weather?", [_REASONING, _MESSAGE, _CALL]),
        ("Both?", [_CALL, _CALL]),
        ("Patch", [_CUSTOM]),
        ("Send", [_CALL]),
        ("Wrong patch", [_MESSAGE]),
        ("Nobody", [_MESSAGE]),
    ],
)
async def test_events_in_their_order(app: Any, said: str, items: list[list[str]]) -> None:
    body = {"input": said, "tools": TOOLS, "include": ["reasoning.encrypted_content"]}
    events = (await ask(app, {**body, "stream": True}, PATH)).events
    for event in events:
        check_event(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    wanted = ["created", "in_progress", *(name for item in items for name in item), "completed"]
    assert _names(events) == [f"response.{name}" for name in wanted]
    _check_deltas(events)
    final, whole = events[-1]["response"], (await ask(app, body, PATH)).json
    Response.model_validate(final)
    Response.model_validate(whole)
    assert [_plain(item) for item in final["output"]] == [_plain(item) for item in whole["output"]]
    assert final.keys() == whole.keys()
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}


def _names(events: list[Any]) -> list[str]:
    """Types of the events; many deltas in a row are one, with a star."""
    names: list[str] = []
    for event in events:
        name = event["type"] + "*" * event["type"].endswith(".delta")
        if name not in names[-1:] or not name.endswith("*"):
            names.append(name)
    return names


def _check_deltas(events: list[Any]) -> None:
    """What is told in pieces, whole, and at the end, is the same; ids and indices go together."""
    pieces: dict[str, str] = {}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == list(range(len(added)))
    assert [event["item"]["id"] for event in added] == [item["id"] for item in done]
    assert done == events[-1]["response"]["output"]
    for event in events:
        if (item_id := event.get("item_id")) is None:
            continue
        assert done[event["output_index"]]["id"] == item_id
        if event["type"].endswith(".delta"):
            pieces[item_id] = pieces.get(item_id, "") + event["delta"]
        elif event["type"].endswith(("text.done", "arguments.done", "input.done")):
            told = [event[name] for name in ("text", "arguments", "input") if name in event]
            assert told == [pieces.get(item_id, "")]


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


async def test_a_client_that_waits_is_told_of_life_and_nothing_before_the_response_is_there(
    app: Any,
) -> None:
    gate = Gate()
    async with FakeEngine([gate, "Done."]) as engine:
        slow = create_app(engine, keep_alive_seconds=0.01)
        client = Client(slow, PATH, {"input": "Hi", "stream": True})
        task = asyncio.create_task(client.run())
        await until(lambda: len(client.events) > 4)
        gate.open()
        await task
    events = client.events
    assert events[0]["type"] == "response.created"
    assert {event["type"] for event in events[1:5]} == {"response.in_progress"}
    assert events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


async def test_an_answer_that_was_cut_is_incomplete(app: Any) -> None:
    body = {"input": "Long", "max_output_tokens": 3}
    whole = (await ask(app, body, PATH)).json
    events = (await ask(app, {**body, "stream": True}, PATH)).events
    assert events[-1]["type"] == "response.incomplete"
    for response in (whole, events[-1]["response"]):
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"
        assert response["max_output_tokens"] == 3
        assert response["usage"]["output_tokens"] == 3


async def test_more_tokens_than_are_left_are_all_that_are_left(app: Any) -> None:
    answer = await ask(app, {"input": "Hello", "max_output_tokens": 32_000}, PATH)
    assert answer.json["status"] == "completed"


async def test_a_call_that_is_wrong_is_never_given_as_right(app: Any) -> None:
    body = {"input": "Wrong?", "tools": TOOLS}
    (item,) = (await ask(app, body, PATH)).json["output"]
    assert item["type"] == "message"
    assert '{"name": "weather"' in item["content"][0]["text"]
    events = (await ask(app, {**body, "stream": True}, PATH)).events
    (item,) = events[-1]["response"]["output"]  # its name was there before it went wrong
    assert item["status"] == "incomplete"
    with pytest.raises(json.JSONDecodeError):
        json.loads(item["arguments"])


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(app: Any, stream: bool) -> None:
    included = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = await ask(app, {"input": "Hello", "stream": stream, **included}, PATH)
    response = answer.events[-1]["response"] if stream else answer.json
    (part,) = response["output"][0]["content"]
    assert "".join(token["token"] for token in part["logprobs"]) == "Hello there, Ann!"
    assert all(len(token["top_logprobs"]) == 1 for token in part["logprobs"])


# What the model gets


def item(role: str, text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "P"}'}
SPOKEN = {"role": "assistant", "content": "Let me see."}
CALLED = {
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "P"}},
            "id": "c1",
        }
    ]
}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("Hello", [{"role": "user", "content": "Hello"}]),
        (
            [item("developer", "Be brief."), {"role": "user", "content": "Hello"}],
            [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        ),
        (
            [item("user", "Hi"), item("system", "Now."), item("user", "Hello")],
            [
                {"role": "user", "content": "Hi"},
                {"role": "system", "content": "Now."},
                {"role": "user", "content": "Hello"},
            ],
        ),
        (
            [THOUGHT, item("assistant", "Let me see.", "output_text"), CALL],
            [{**SPOKEN, "reasoning_content": "Hm.", **CALLED}],
        ),
        (
            [{**THOUGHT, "content": None, "encrypted_content": "gAAA"}, {**CALL, "id": "fc_1"}],
            [{"role": "assistant", "content": "", "reasoning_content": "Hm.", **CALLED}],
        ),
        (
            [{**THOUGHT, "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}],
            [{"role": "assistant", "content": "", "reasoning_content": "Hm."}],
        ),
        (
            [
                {**CALL, "status": "completed"},
                {"type": "function_call_output", "call_id": "c1", "output": "21"},
                THOUGHT,
                item("assistant", "It is 21.", "output_text"),
            ],
            [
                {"role": "assistant", "content": "", **CALLED},
                {"role": "tool", "tool_call_id": "c1", "content": "21"},
                {"role": "assistant", "content": "It is 21.", "reasoning_content": "Hm."},
            ],
        ),
        (
            [
                {**CALL, "arguments": None, "namespace": "mail", "name": "send"},
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_text", "text": "sent"}],
                },
            ],
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "mail__send", "arguments": {}},
                            "id": "c1",
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sent"},
            ],
        ),
        (
            [
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "Hello"},
            ],
            [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Hello"}],
        ),
    ],
)
async def test_items_become_messages(items: Any, messages: list[Any]) -> None:
    async with FakeEngine("Yes.") as engine:
        request = await last_request(create_app(engine), engine, {"input": items})
    assert request.messages == messages


async def test_an_answer_s_items_sent_back_are_the_answer(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    sent: list[Any] = [{"role": "user", "content": "Weather?"}]
    options: Any = {"model": "fake", "tools": TOOLS, "include": ["reasoning.encrypted_content"]}
    first = await client.responses.create(input=sent, **options)
    turn = [item.to_dict() for item in first.output]
    turn[0] = {**turn[0], "summary": [], "content": None}  # as some clients send it back
    output = {"type": "function_call_output", "call_id": turn[-1]["call_id"], "output": "Sunny"}
    second = await client.responses.create(input=[*sent, *turn, output], **options)
    assert second.output_text == "It is sunny."
    assert engine.requests[-1].messages is not None
    _, answer, result = engine.requests[-1].messages
    assert answer["content"] == "Let me see."
    assert answer["reasoning_content"] == "Hm."
    assert answer["tool_calls"][0]["id"] == result["tool_call_id"] == turn[-1]["call_id"]
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0


async def test_custom_calls_sent_back(app: Any, engine: FakeEngine) -> None:
    first = (await ask(app, {"input": "Patch", "tools": TOOLS}, PATH)).json
    (call,) = first["output"]
    assert call["input"] == '*** "a"\n+b'
    output = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Sunny"}
    await ask(app, {"input": [call, output], "tools": TOOLS}, PATH)
    assert engine.requests[-1].messages is not None
    function = engine.requests[-1].messages[0]["tool_calls"][0]["function"]
    assert function == {"name": "patch", "arguments": {"input": '*** "a"\n+b'}}


async def test_tools_are_functions_to_the_model(app: Any, engine: FakeEngine) -> None:
    request = await last_request(app, engine, {"tools": TOOLS, "parallel_tool_calls": False})
    assert request.tools is not None
    functions = [tool["function"] for tool in request.tools]
    assert [function["name"] for function in functions] == ["weather", "patch", "mail__send"]
    assert functions[0]["parameters"] == WEATHER["parameters"]
    assert functions[1]["parameters"]["required"] == ["input"]
    assert 'start: "x"' in functions[1]["description"]
    assert not request.parallel_tool_calls
    answer = await ask(app, {"input": "Send", "tools": TOOLS}, PATH)
    assert answer.json["output"][0]["name"] == "send"
    assert answer.json["output"][0]["namespace"] == "mail"
    assert answer.headers["x-mlx-engine-ignored"] == "tools of type 'web_search'"


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_tool_choice_is_the_engine_s(app: Any, engine: FakeEngine, choice: str) -> None:
    request = await last_request(app, engine, {"tools": TOOLS, "tool_choice": choice})
    assert request.tool_choice == choice


async def test_some_of_the_tools_may_be_allowed(app: Any, engine: FakeEngine) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER, {"type": "web_search"}]}
    request = await last_request(app, engine, {"tools": TOOLS, "tool_choice": allowed})
    assert request.tools is not None
    assert [tool["function"]["name"] for tool in request.tools] == ["weather"]


async def test_options(app: Any, engine: FakeEngine) -> None:
    asked = {"temperature": 0.3, "top_p": 0.5, "max_output_tokens": 7, "tools": []}
    told = {"metadata": {"a": "b"}, "user": "ann", "prompt_cache_key": "k", "truncation": "auto"}
    ignored = {"store": True, "client_metadata": {}, "service_tier": "auto", "stream_options": {}}
    body = {"input": "Hello", **asked, **told, **ignored, "reasoning": {"effort": "low"}, "new": 1}
    answer = await ask(app, body, PATH)
    params = engine.requests[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 7)
    assert engine.requests[-1].thinking is True
    assert engine.requests[-1].max_reasoning_tokens == 2_048
    for name in ("metadata", "user", "prompt_cache_key", "temperature", "reasoning"):
        assert answer.json[name] == body[name]
    assert answer.json["store"] is False
    assert answer.json["truncation"] == "disabled"
    assert answer.headers["x-mlx-engine-ignored"] == "new, truncation"


# Items by their ids


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["items", "references"])
async def test_items_may_come_back_by_their_ids(
    app: Any, engine: FakeEngine, stream: bool, how: str
) -> None:
    """As Vercel's SDK sends them where nobody has told it that nothing is stored."""
    asked = {"tools": TOOLS, "input": "Weather?", "stream": stream}
    reply = await ask(app, asked, PATH)
    output = reply.events[-1]["response"]["output"] if stream else reply.json["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    if how == "references":
        given = [{"type": "item_reference", "id": item["id"]} for item in output]
    else:
        given = output
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "Sunny"}
    again = {**asked, "input": [{"role": "user", "content": "Weather?"}, *given, result]}
    request = await last_request(app, engine, again)
    assert request.messages is not None
    _, said, told = request.messages
    assert (said["content"], said["reasoning_content"]) == ("Let me see.", "Hm.")
    (call,) = said["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert (told["role"], told["content"], told["tool_call_id"]) == ("tool", "Sunny", call["id"])


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_not_to_be_stored_is_not(app: Any, stream: bool) -> None:
    reply = await ask(app, {"input": "Hello", "store": False, "stream": stream}, PATH)
    response = reply.events[-1]["response"] if stream else reply.json
    named = {"type": "item_reference", "id": response["output"][0]["id"]}
    reply = await ask(app, {"input": [named]}, PATH)
    assert reply.status == 400
    assert "send the item itself" in reply.json["error"]["message"]


def test_items_are_kept_as_long_as_there_is_room() -> None:
    items = [{"id": f"msg_{n}", "text": "x" * 100} for n in range(100)]
    kept = KeptItems(most=1_000)
    kept.keep(items[:5])
    for item in items[5:]:
        kept.keep([item])
        assert kept.find("msg_0") == items[0], "it is asked for all the time"
    found = [item["id"] for item in items if kept.find(item["id"])]
    assert 2 < len(found) < 9
    assert found == ["msg_0", *(item["id"] for item in items[101 - len(found) :])]
    kept.keep([{"id": "large", "text": "x" * 2_000}])
    assert not any(kept.find(item["id"]) for item in items)


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 1}, "input"),
        ({"input": [1]}, "input"),
        ({"input": [{"content": "Hi"}]}, "input"),
        ({"input": [{"role": "owl", "content": "Hi"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 1}]}, None),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 1}]}]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": "Hello", "instructions": 1}, "instructions"),
        ({"input": "Hello", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "Hello", "conversation": "conv_1"}, "conversation"),
        ({"input": "Hello", "background": True}, "background"),
        ({"input": "Hello", "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": "Hello", "include": "all"}, "include"),
        ({"input": "Hello", "reasoning": "high"}, "reasoning"),
        ({"input": "Hello", "reasoning": {"effort": "huge"}}, "reasoning_effort"),
        ({"input": "Hello", "text": "json"}, "text"),
        ({"input": "Hello", "text": {"format": "json"}}, "text.format"),
        ({"input": "Hello", "text": {"format": {"type": "xml"}}}, "text.format"),
        ({"input": "Hello", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "Hello", "max_output_tokens": "many"}, "max_tokens"),
        ({"input": "Hello", "tools": {}}, "tools"),
        ({"input": "Hello", "tools": [1]}, "tools"),
        ({"input": "Hello", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "Hello", "tools": [{"type": "namespace", "name": "a", "tools": 1}]}, "tools"),
        ({"input": "Hello", "tool_choice": "required"}, "tool_choice"),
        ({"input": "Hello", "tools": [WEATHER], "tool_choice": "some"}, "tool_choice"),
        ({"input": "Hello", "tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        (
            {"input": "Hello", "tools": [WEATHER], "tool_choice": {"type": "function"}},
            "tool_choice",
        ),
        ({"input": "Hello", "stream": 1}, "stream"),
        ({"input": "word " * 300}, "input"),
    ],
)
async def test_a_request_that_can_never_work(app: Any, body: Any, param: str | None) -> None:
    for stream in ({}, {"stream": True}):
        answer = await ask(app, {**stream, **body}, PATH)
        assert answer.status == 400, answer.data
        assert answer.headers["content-type"] == "application/json"
        error = answer.json["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param or param is None


async def test_a_context_that_is_full_is_told_in_words_that_agents_know(app: Any) -> None:
    error = (await ask(app, {"input": "word " * 300}, PATH)).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 200 tokens" in error["message"]


async def test_a_failure_in_the_middle_is_the_last_event(
    app: Any, client: openai.AsyncOpenAI
) -> None:
    events = (await ask(app, {"input": "Fail", "stream": True}, PATH)).events
    check_event(events[-1])
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert "out of memory" in response["error"]["message"]
    assert response["output"][0]["status"] == "incomplete"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        await client.responses.create(model="fake", input="Fail at once", stream=True)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        await client.responses.create(model="fake", input="Fail")


async def test_a_busy_engine_says_when_to_come_again() -> None:
    gate = Gate()
    async with FakeEngine([gate, "x"], queue_limit=0) as engine:
        app = create_app(engine)
        first = asyncio.create_task(ask(app, {"input": "Hi"}, PATH))
        await gate.reached()
        answer = await ask(app, {"input": "Hi", "stream": True}, PATH)
        gate.open()
        assert (await first).status == 200
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert len(engine.requests) == 1
