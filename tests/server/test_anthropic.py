"""Anthropic's messages, by Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, MessageTokensCount

from mlx_engine import BatchedEngine, GenerationError, JSONSchema, ToolCall
from mlx_engine.errors import EngineDead
from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate, ScriptError
from tests.server.asgi import Client, ask
from tests.waiting import until

pytestmark = pytest.mark.anyio

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
WEATHER: Any = {
    "name": "weather",
    "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINKS: Any = {"type": "enabled", "budget_tokens": 1024}
CALL = FakeAnswer(
    "Let me see.", reasoning="Hm, Paris.", tool_calls=[("weather", {"city": "Paris"})]
)
ANSWERS: dict[str, Any] = {
    "Hello": "Hello there, Ann!",
    "Think": FakeAnswer("It is four.", reasoning="Two and two"),
    "Weather?": CALL,
    "Both?": FakeAnswer(tool_calls=[("weather", {"city": "Paris"}), ("weather", {})]),
    "Wrong?": FakeAnswer(tool_calls=[ToolCall("wether", {}, '{"name": "wether"}', "no such tool")]),
    "Long": "word " * 50,
    "Nothing": FakeAnswer(reasoning="Nothing to be said"),
    "21 degrees": "It is warm.",
    "Fails": ["some", GenerationError("out of memory")],
    "Dies": ["some", EngineDead("it is gone")],
    "It is": "warm.",
}
KINDS = {
    "text": ("Hello", {}),
    "thinking": ("Think", {"thinking": THINKS}),
    "hidden thinking": ("Think", {}),
    "calls": ("Both?", {"tools": [WEATHER]}),
    "all": ("Weather?", {"tools": [WEATHER], "thinking": {"type": "adaptive"}}),
    "omitted": ("Weather?", {"tools": [WEATHER], "thinking": {**THINKS, "display": "omitted"}}),
    "a stop string": ("Hello", {"stop_sequences": ["Bob", ", Ann"]}),
    "too few tokens": ("Long", {"max_tokens": 3}),
    "a call that is cut off": ("Both?", {"tools": [WEATHER], "max_tokens": 2}),
    "nothing": ("Nothing", {}),
}


@pytest.fixture
def client(http: httpx2.AsyncClient) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url="http://localhost", api_key="any", http_client=http, max_retries=0
    )


def body(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "fake", "max_tokens": 100, "messages": messages, **fields}


def check_order(events: list[Any]) -> None:
    """See that events come in the order that the API's description has, with its numbers."""
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    number, begun = -1, ""
    allowed = {"text": ["text_delta"], "tool_use": ["input_json_delta"]}
    allowed["thinking"] = ["thinking_delta", "signature_delta"]
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not begun
                number, begun = number + 1, event["content_block"]["type"]
            case "content_block_delta":
                assert event["delta"]["type"] in allowed[begun]
            case "content_block_stop":
                assert begun
                begun = ""
            case _:
                assert not begun or event["type"] == "ping"
                continue
        assert event["index"] == number
    assert number >= 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_says_what_a_whole_answer_says(
    client: anthropic.AsyncAnthropic, app: Any, kind: str
) -> None:
    text, fields = KINDS[kind]
    given: Any = body(text, **fields)
    whole = await client.messages.create(**given)
    Message.model_validate(whole.to_dict(), strict=True)
    async with client.messages.stream(**given) as stream:
        streamed = await stream.get_final_message()
    unlike = {"id", "usage", "parsed_output"}
    one, other = (
        json.loads(each.model_dump_json(exclude=unlike, exclude_none=True))
        for each in (whole, streamed)
    )
    for block in one["content"] + other["content"]:
        block.pop("id", None)
    if kind != "a call that is cut off":  # of which there is nothing in a whole answer
        assert one == other
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    raw = await ask(app, {**given, "stream": True}, PATH)
    check_order(raw.events)
    names = [line[7:] for line in raw.data.decode().split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in raw.events]


async def test_what_is_in_an_answer(client: anthropic.AsyncAnthropic) -> None:
    found = {
        kind: await client.messages.create(**body(text, **f)) for kind, (text, f) in KINDS.items()
    }
    blocks = {kind: [block.type for block in answer.content] for kind, answer in found.items()}
    assert blocks["text"] == blocks["hidden thinking"] == blocks["nothing"] == ["text"]
    assert blocks["all"] == blocks["omitted"] == ["thinking", "text", "tool_use"]
    assert blocks["calls"] == ["tool_use", "tool_use"]
    stops = {kind: answer.stop_reason for kind, answer in found.items()}
    assert stops["calls"] == stops["all"] == "tool_use"
    assert stops["text"] == "end_turn"
    assert stops["too few tokens"] == stops["a call that is cut off"] == "max_tokens"
    assert stops["a stop string"] == "stop_sequence"
    assert found["a stop string"].stop_sequence == ", Ann"
    thinking: Any = found["thinking"].content[0]
    omitted: Any = found["omitted"].content[0]
    assert (thinking.thinking, omitted.thinking) == ("Two and two", "")
    assert thinking.signature
    assert found["thinking"].usage.output_tokens_details.thinking_tokens == 3  # type: ignore[union-attr]
    calls: Any = found["calls"].content
    assert [call.input for call in calls] == [{"city": "Paris"}, {}]
    assert len({call.id for call in calls}) == 2


async def test_a_call_that_is_wrong_is_never_given_as_right(
    client: anthropic.AsyncAnthropic, app: Any
) -> None:
    given: Any = body("Wrong?", tools=[WEATHER])
    whole = await client.messages.create(**given)
    assert [block.type for block in whole.content] == ["text"]
    assert "wether" in whole.content[0].text  # type: ignore[union-attr]
    raw = await ask(app, {**given, "stream": True}, PATH)
    check_order(raw.events)
    assert raw.events[-2]["delta"]["stop_reason"] == whole.stop_reason == "end_turn"
    with pytest.raises(ValueError, match="Unable to parse"):  # its name was there before
        async with client.messages.stream(**given) as stream:
            await stream.get_final_message()


async def test_options_are_the_engines(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    more: Any = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "output_config": {"effort": "low"}}
    await client.messages.create(
        **body("Hello", stop_sequences=["Bob"], thinking={"type": "adaptive"}), extra_body=more
    )
    asked = engine.requests[-1]
    params = asked.params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 5)
    assert tuple(params.stop) == ("Bob",)
    assert (params.max_tokens, asked.thinking, asked.max_reasoning_tokens) == (100, True, 2048)
    await client.messages.create(**body("Hello", thinking=THINKS))
    assert engine.requests[-1].max_reasoning_tokens == 1024
    await client.messages.create(**body("Hello"))
    assert engine.requests[-1].thinking is False
    chosen = {"type": "auto", "disable_parallel_tool_use": True}
    await client.messages.create(**body("Hello", tools=[WEATHER], tool_choice=chosen))
    asked = engine.requests[-1]
    assert (asked.tool_choice, asked.parallel_tool_calls) == ("auto", False)
    assert asked.tools[0]["function"]["parameters"] == WEATHER["input_schema"]  # type: ignore[index]
    await client.messages.create(**body("Hello", tools=[WEATHER], tool_choice={"type": "none"}))
    assert engine.requests[-1].tool_choice == "none"
    shape = {"format": {"type": "json_schema", "schema": schema}}
    with pytest.raises(anthropic.InternalServerError, match="the server has failed"):
        await client.messages.create(**body("Hello", output_config=shape))
    with pytest.raises(ScriptError, match="the scripted answer breaks"):
        engine.check_script()
    assert engine.requests[-1].params.constraint == JSONSchema(schema)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
@pytest.mark.parametrize("tools", [[], None, [{"type": "web_search_20250305", "name": "web"}]])
async def test_a_call_cannot_be_forced_without_tools(app: Any, choice: Any, tools: Any) -> None:
    reply = await ask(app, body("Hello", tools=tools, tool_choice=choice), "/v1/messages")
    assert reply.status == 400
    assert "tool_choice" in reply.json["error"]["message"]


async def test_unknown_fields_change_nothing(app: Any, engine: FakeEngine) -> None:
    more = {"metadata": {"user_id": "{}"}, "context_management": {"edits": []}, "safeguards": [1]}
    tools = [
        {**WEATHER, "defer_loading": True, "eager_input_streaming": True, "cache_control": {}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    given = body("Hello", **more, tools=tools, thinking=None, mcp_servers=[], betas=["x"])
    answer = await ask(app, given, PATH, headers={"anthropic-beta": "a,b", "x-api-key": "k"})
    assert answer.status == 200
    said = answer.headers["x-mlx-engine-ignored"]
    assert "web_search_20250305" in said
    assert "mcp_servers" in said
    assert "metadata" not in said
    assert [tool["function"]["name"] for tool in engine.requests[-1].tools or ()] == ["weather"]


async def test_a_call_is_made_and_answered(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    given: Any = body("Weather?", tools=[WEATHER], thinking={**THINKS, "display": "omitted"})
    first = await client.messages.create(**given)
    call: Any = first.content[-1]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees"}
    given["messages"] += [
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    second = await client.messages.create(**given)
    assert second.content[0].text == "It is warm."  # type: ignore[union-attr]
    asked = engine.requests[-1].messages
    assert asked is not None
    assert asked[1]["reasoning_content"] == "Hm, Paris."  # it was in the signature
    assert asked[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert asked[2]["role"] == "tool"
    assert second.usage.cache_read_input_tokens
    told = second.usage.input_tokens + second.usage.cache_read_input_tokens
    assert told == len(engine.requests[-1].prompt_tokens)


async def test_an_answer_that_is_begun_goes_on(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    given: Any = body("Weather?")
    given["messages"].append({"role": "assistant", "content": "It is"})
    assert (await client.messages.create(**given)).content[0].text == "warm."  # type: ignore[union-attr]
    assert engine.requests[-1].continue_final_message


async def test_tokens_are_counted_beside_the_models_turn(app: Any) -> None:
    gate = Gate()
    async with FakeEngine(["a", gate]) as engine:
        app = create_app(engine)
        task = asyncio.create_task(ask(app, body("Hello"), PATH))
        await gate.reached()
        counted = await asyncio.gather(
            *(
                ask(app, {"model": "fake", **body(" ".join(["Hello"] * n), tools=[])}, COUNT)
                for n in range(1, 26)
            )
        )
        for each in counted:
            assert each.status == 200
            MessageTokensCount.model_validate(each.json, strict=True)
        numbers = [each.json["input_tokens"] for each in counted]
        assert numbers == sorted(set(numbers))
        assert not task.done()
        gate.open()
        assert (await task).json["usage"]["input_tokens"] == numbers[0]


@pytest.mark.parametrize("path", ["/v1/messages", "/messages"])
async def test_with_and_without_v1(app: Any, path: str) -> None:
    assert (await ask(app, body("Hello"), path)).status == 200
    assert (await ask(app, body("Hello"), f"{path}/count_tokens")).status == 200


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}


def conversation(content: Any, **fields: Any) -> dict[str, Any]:
    return {**body("Hello", **fields), "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("given", "status", "kind", "said"),
    [
        (body("Hello", messages=[]), 400, "invalid_request_error", "messages: must not be empty"),
        (body("Hello", messages="Hi"), 400, "invalid_request_error", "messages: must be a list"),
        (body("Hello", messages=[1]), 400, "invalid_request_error", "messages: number 0"),
        (body("Hello", messages=[{"role": "wizard"}]), 400, "invalid_request_error", "wizard"),
        (conversation(3), 400, "invalid_request_error", "number 0 ('user'): content must be"),
        (conversation([{"type": "text"}]), 400, "invalid_request_error", "must be text"),
        (conversation([IMAGE]), 400, "invalid_request_error", "images are not supported"),
        (body("Hello", system=3), 400, "invalid_request_error", "system: content must be"),
        (body("Hello", system=[IMAGE]), 400, "invalid_request_error", "system: images"),
        (body("Hello", thinking={"type": "x"}), 400, "invalid_request_error", "thinking: its type"),
        (body("Hello", thinking=7), 400, "invalid_request_error", "thinking: must be an object"),
        (body("Hello", tools=7), 400, "invalid_request_error", "tools: must be a list"),
        (body("Hello", tools=[{}]), 400, "invalid_request_error", "tools: number 0 has no name"),
        (body("Hello", tool_choice={"type": "x"}), 400, "invalid_request_error", "tool_choice"),
        (body("Hello", output_config={"format": 1}), 400, "invalid_request_error", "output_config"),
    ],
)
async def test_bad_requests(
    app: Any, path: str, stream: bool, given: Any, status: int, kind: str, said: str
) -> None:
    answer = await ask(app, {**given, "stream": stream}, path)
    assert answer.status == status
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == kind
    assert said in answer.json["error"]["message"]
    assert answer.json["request_id"] == answer.headers["request-id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_agents_know(
    app: Any, stream: bool
) -> None:
    answer = await ask(app, body("word " * 300, stream=stream), PATH)
    assert answer.status == 400
    tokens = (await ask(app, body("word " * 300), COUNT)).json["input_tokens"]
    said = answer.json["error"]["message"]
    assert said.startswith(f"prompt is too long: {tokens} tokens > 200 maximum")
    assert answer.json["error"]["type"] == "invalid_request_error"


async def test_more_tokens_than_are_left_means_all_that_are_left(
    client: anthropic.AsyncAnthropic,
) -> None:
    answer = await client.messages.create(**{**body("Long"), "max_tokens": 9_000})
    assert answer.stop_reason == "end_turn"
    assert (await client.messages.create(**{**body("x"), **body("Long", max_tokens=190)})).content


async def test_a_full_engine_says_when_to_come_again() -> None:
    gate = Gate()
    async with FakeEngine(["a", gate], queue_limit=0) as engine:
        app = create_app(engine)
        task = asyncio.create_task(ask(app, body("Hello"), PATH))
        await gate.reached()
        for stream in (False, True):
            busy = await ask(app, body("Hello", stream=stream), PATH)
            assert busy.status == 429
            assert int(busy.headers["retry-after"]) >= 1
            assert busy.json["error"]["type"] == "rate_limit_error"
        gate.open()
        assert (await task).status == 200
    stopped = await ask(app, body("Hello"), PATH)
    assert stopped.status == 503
    assert stopped.headers["retry-after"]
    assert stopped.json["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(("text", "kind"), [("Fails", "api_error"), ("Dies", "overloaded_error")])
async def test_an_error_after_the_first_token_is_an_event(text: str, kind: str) -> None:
    async with FakeEngine(ANSWERS) as engine:
        app = create_app(engine)
        answer = await ask(app, body(text, stream=True), PATH)
        assert answer.status == 200
        assert answer.events[-1]["type"] == "error"
        assert answer.events[-1]["error"]["type"] == kind
        assert b"event: error\n" in answer.data
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as http:
            client = anthropic.AsyncAnthropic(
                base_url="http://localhost", api_key="any", http_client=http, max_retries=0
            )
            with pytest.raises(anthropic.APIStatusError):
                async with client.messages.stream(**body(text)) as stream:
                    await stream.get_final_message()


async def test_pings_come_from_the_moment_that_a_request_is_in() -> None:
    """Also while the model thinks what its client does not see."""
    gates = [Gate(), Gate()]
    answer = FakeAnswer(["b"], reasoning=[gates[0], "a", gates[1]])
    async with FakeEngine(answer) as engine:
        client = Client(create_app(engine, keep_alive_seconds=0.01), PATH, body("Hi", stream=True))
        task = asyncio.create_task(client.run())
        for gate in gates:
            await gate.reached()
            before = client.data.count(b"event: ping")
            await until(lambda before=before: client.data.count(b"event: ping") > before + 2)
            gate.open()
        await task
        check_order(client.events)


async def test_a_second_turn_is_in_the_prompt_cache(tiny_path: Path) -> None:
    """Whatever is in front of it: the billing line of an agent is another one each time."""
    async with BatchedEngine(tiny_path) as engine:
        app = create_app(engine)
        name = (await ask(app, None, "/v1/models", method="GET")).json["data"][0]["id"]

        def given(billing: str, messages: list[Any]) -> dict[str, Any]:
            mark = {"cache_control": {"type": "ephemeral"}}
            system = [
                {"type": "text", "text": f"x-anthropic-billing-header: cch={billing};"},
                {"type": "text", "text": "You are an agent of few words. " * 4, **mark},
            ]
            fields = {"system": system, "tools": [WEATHER], "messages": messages}
            return {"model": name, "max_tokens": 12, "temperature": 0, **fields}

        talk: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        first = (await ask(app, given("1", talk), PATH)).json
        assert first["usage"]["cache_read_input_tokens"] == 0
        talk += [
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": "And again"},
        ]
        second = await ask(app, {**given("2", talk), "stream": True}, PATH)
        begun, ended = second.events[0]["message"]["usage"], second.events[-2]["usage"]
        assert begun["cache_read_input_tokens"] >= first["usage"]["input_tokens"]
        assert {**ended, "output_tokens": 0}.items() >= begun.items()
        unsteady = create_app(engine, steady_prompts=False)
        third = (await ask(unsteady, given("3", talk), PATH)).json
        assert third["usage"]["cache_read_input_tokens"] < first["usage"]["input_tokens"] - 100
