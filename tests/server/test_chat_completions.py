"""OpenAI's chats, by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from mlx_engine import AnyJSON, Choice, JSONSchema, Regex, SamplingParams, ToolCall
from mlx_engine.server import create_app
from mlx_engine.server.asked import Fields
from mlx_engine.server.chat_completions import ChatCompletions
from mlx_engine.server.completions import Completions
from mlx_engine.server.responses import Responses
from mlx_engine.testing import FakeAnswer, FakeEngine
from tests.server.asgi import CHAT, ask

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
BARE = {"type": "function", "function": {"name": "bare"}}  # without parameters
NAMED = {"type": "object", "properties": {"name": {"type": "string"}}}
CALL = FakeAnswer("Let me see.", reasoning="Hm.", tool_calls=[("weather", {"city": "Paris"})])
ANSWERS: dict[str, Any] = {
    "Hello": "Hello there, Ann!",
    "Think": FakeAnswer("It is four.", reasoning="Two and two"),
    "Weather?": CALL,
    "Both?": FakeAnswer(tool_calls=[("weather", {"city": "Paris"}), ("weather", {"city": "Lyon"})]),
    "Wrong?": FakeAnswer(tool_calls=[ToolCall("wether", {}, '{"name": "wether"}', "no such tool")]),
    "Long": "word " * 50,
}


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="fake", messages=said("Hello"))
    assert answer.model == "fake"
    assert answer.choices[0].message.content == "Hello there, Ann!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("usage", [True, False])
async def test_a_streamed_answer(client: openai.AsyncOpenAI, usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    stream = await client.chat.completions.create(
        model="fake", messages=said("Think"), stream=True, **options
    )
    chunks = [chunk async for chunk in stream]
    counts = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(counts) == usage
    if usage:
        assert not chunks.pop().choices
        assert counts[0].completion_tokens_details.reasoning_tokens == 3
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "It is four."
    thoughts = [getattr(delta, "reasoning_content", "") for delta in deltas]
    assert "".join(thoughts) == "Two and two"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


async def test_calls_come_as_they_are_made(client: openai.AsyncOpenAI) -> None:
    options: Any = {"model": "fake", "messages": said("Both?"), "tools": [WEATHER]}
    async with client.chat.completions.stream(**options) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    whole = await client.chat.completions.create(**options)
    for each in (answer, whole):
        choice = each.choices[0]
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls
        assert [c.function.arguments for c in calls] == ['{"city": "Paris"}', '{"city": "Lyon"}']
        assert {c.function.name for c in calls} == {"weather"}
        assert len({c.id for c in calls}) == 2
        assert not choice.message.content


async def test_a_call_that_is_wrong_is_never_given_as_right(app: Any) -> None:
    body = {"messages": said("Wrong?"), "tools": [WEATHER]}
    whole = (await ask(app, body)).json["choices"][0]
    assert "wether" in whole["message"]["content"]
    assert "tool_calls" not in whole["message"]
    assert whole["finish_reason"] == "stop"
    events = (await ask(app, {**body, "stream": True})).events
    calls = [c for event in events[:-1] for c in event["choices"][0]["delta"].get("tool_calls", ())]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    with pytest.raises(json.JSONDecodeError):  # its name was there before it went wrong
        json.loads(arguments)
    ChatCompletion.model_validate((await ask(app, body)).json)


async def last(engine: FakeEngine, app: Any, **fields: Any) -> Any:
    """Ask for an answer, and see what the engine was asked for."""
    reply = await ask(app, {"messages": HELLO, **fields})
    assert reply.status == 200, reply.json
    return engine.requests[-1]


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("temperature", 0.5, "temperature"),
        ("top_p", 0.5, "top_p"),
        ("top_k", 5, "top_k"),
        ("min_p", 0.1, "min_p"),
        ("presence_penalty", 0.5, "presence_penalty"),
        ("frequency_penalty", 0.5, "frequency_penalty"),
        ("repetition_penalty", 1.5, "repetition_penalty"),
        ("seed", 5, "seed"),
        ("max_tokens", 7, "max_tokens"),
        ("max_completion_tokens", 7, "max_tokens"),
        ("max_tokens", None, "max_tokens"),
    ],
)
async def test_sampling_parameters_arrive(
    engine: FakeEngine, app: Any, field: str, value: Any, option: str
) -> None:
    assert getattr((await last(engine, app, **{field: value})).params, option) == value


@pytest.mark.parametrize("field", ["seed", "max_tokens", "max_completion_tokens", "top_k"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_minus_one_leaves_open_what_the_server_would_limit(
    engine: FakeEngine, field: str, path: str
) -> None:
    """As llama-server, LM Studio and vLLM have it."""
    app = create_app(engine, defaults=SamplingParams(max_tokens=1, seed=3, top_k=5))
    asked = {"/v1/completions": {"prompt": "Hello"}, "/v1/responses": {"input": "Hello"}}
    body = {**asked.get(path, {"messages": HELLO}), field: -1}
    assert (await ask(app, body, path)).status == 200
    option = "max_tokens" if "max" in field and "messages" not in path else field
    expected = {"top_k": 0}.get(option)
    if option != "max_completion_tokens":  # which Anthropic's API has not
        assert getattr(engine.requests[-1].params, option) == expected


async def test_what_a_request_leaves_open_is_the_servers(engine: FakeEngine) -> None:
    app = create_app(engine, defaults=SamplingParams(temperature=0.7, max_tokens=9))
    params = (await last(engine, app, top_p=0.5)).params
    assert (params.temperature, params.max_tokens, params.top_p) == (0.7, 9, 0.5)
    assert (await last(engine, app, temperature=0)).params.temperature == 0


async def test_logit_bias_has_keys_that_are_texts(engine: FakeEngine, app: Any) -> None:
    assert (await last(engine, app, logit_bias={"5": -100})).params.logit_bias == {5: -100}


async def test_stop_may_be_a_text_or_a_list(client: openai.AsyncOpenAI) -> None:
    for stop in (" Ann", [" Bob", " Ann"]):
        answer = await client.chat.completions.create(
            model="fake", messages=said("Hello"), stop=stop
        )
        assert answer.choices[0].message.content == "Hello there,"
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("name", "given", "constraint"),
    [
        ("response_format", {"type": "text"}, None),
        ("response_format", {"type": "json_object"}, AnyJSON()),
        ("response_format", {"type": "json_object", "schema": NAMED}, JSONSchema(NAMED)),
        ("response_format", {"type": "json_schema", "schema": NAMED}, JSONSchema(NAMED)),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": NAMED}},
            JSONSchema(NAMED),
        ),
        ("structured_outputs", {}, None),
        ("structured_outputs", {"json": NAMED, "disable_fallback": True}, JSONSchema(NAMED)),
        ("structured_outputs", {"json": json.dumps(NAMED)}, JSONSchema(NAMED)),
        ("structured_outputs", {"json_object": True}, AnyJSON()),
        ("structured_outputs", {"regex": "[ab]+", "json": None}, Regex("[ab]+")),
        ("structured_outputs", {"choice": ["yes", "no"]}, Choice(["yes", "no"])),
        ("guided_json", NAMED, JSONSchema(NAMED)),
        ("guided_regex", "[ab]+", Regex("[ab]+")),
        ("guided_choice", ["yes", "no"], Choice(["yes", "no"])),
        ("json_schema", NAMED, JSONSchema(NAMED)),
        ("grammar", "", None),
    ],
)
def test_the_form_of_an_answer_is_a_constraint(name: str, given: Any, constraint: object) -> None:
    """Under each name that servers have for it: none is left out, as if nothing had been asked."""
    for api, body in (
        (ChatCompletions(), {"messages": HELLO}),
        (Completions(), {"prompt": "Hello"}),
        (Responses(), {"input": "Hello"}),
    ):
        asked = api.read(Fields({**body, name: given}))
        assert asked.options.get("constraint") == constraint
        assert name not in asked.ignored


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice"])
async def test_a_form_that_is_none_is_refused(app: Any, name: str) -> None:
    for given in (7, {"type": "owl"}, "(", []):
        reply = await ask(app, {"messages": HELLO, name: given})
        assert reply.status == 400


@pytest.mark.parametrize(
    ("effort", "thinking", "tokens", "variable"),
    [
        ("none", False, None, None),
        ("minimal", True, 512, "low"),
        ("low", True, 2_048, "low"),
        ("medium", True, 8_192, "medium"),
        ("high", True, None, "high"),
        ("xhigh", True, None, "high"),
    ],
)
async def test_reasoning_effort(
    engine: FakeEngine, app: Any, effort: str, thinking: bool, tokens: int | None, variable: str
) -> None:
    request = await last(engine, app, reasoning_effort=effort)
    assert request.thinking is thinking
    assert request.max_reasoning_tokens == tokens
    asked = ChatCompletions().read(Fields({"messages": HELLO, "reasoning_effort": effort}))
    assert asked.chat.get("chat_template_kwargs", {}).get("reasoning_effort") == variable


@pytest.mark.parametrize(
    ("given", "thinking", "tokens"),
    [
        ({"thinking": True}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled"}}, True, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, True, 7),
        ({"enable_thinking": False}, False, None),
        ({"enable_thinking": True, "thinking": False}, False, None),
        ({"reasoning": {"effort": "low"}}, True, 2_048),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "none"}, False, None),
        ({"reasoning": {}}, None, None),
        ({}, None, None),
    ],
)
async def test_the_switch_has_several_names(
    engine: FakeEngine, app: Any, given: dict[str, Any], thinking: bool, tokens: int | None
) -> None:
    request = await last(engine, app, **given)
    assert (request.thinking, request.max_reasoning_tokens) == (thinking, tokens)


@pytest.mark.parametrize(
    ("choice", "names", "arrives"),
    [
        ("any", ["weather", "bare"], "required"),
        (None, ["weather", "bare"], "auto"),
        ({"mode": "required", "tools": [BARE]}, ["bare"], "required"),
        ({"mode": "auto", "tools": [BARE, WEATHER]}, ["weather", "bare"], "auto"),
        ({"tools": [{"type": "function", "function": {"name": "weather"}}]}, ["weather"], "auto"),
    ],
)
async def test_which_tools_may_be_called(
    app: Any, choice: Any, names: list[str], arrives: str
) -> None:
    if isinstance(choice, dict):
        choice = {"type": "allowed_tools", "allowed_tools": choice}
    asked = {"messages": HELLO, "tools": [WEATHER, BARE], "tool_choice": choice}
    chat = ChatCompletions().read(Fields(asked)).chat
    assert [tool["function"]["name"] for tool in chat["tools"]] == names
    assert chat["tool_choice"] == arrives


async def test_a_model_that_does_not_reason_is_not_told_to() -> None:
    async with FakeEngine("Hi.", supports_reasoning=False) as engine:
        app = create_app(engine)
        assert (await last(engine, app, reasoning_effort="high")).thinking is None


async def test_tools_of_other_kinds_are_left_out_and_others_arrive(
    engine: FakeEngine, app: Any
) -> None:
    request = await last(
        engine, app, tools=[WEATHER, {"type": "web_search"}, BARE], parallel_tool_calls=False
    )
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "bare"]
    assert request.parallel_tool_calls is False
    request = await last(engine, app, tools=[WEATHER], tool_choice="none")
    assert request.tool_choice == "none"
    request = await last(engine, app, tools=[], tool_choice="auto")
    assert not request.tools


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be kind."}, *HELLO],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "Hello"}],
        [*HELLO, {"role": "system", "content": "Hello"}],
        [
            *HELLO,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            *HELLO,
        ],
        *(
            [
                *HELLO,
                {
                    "role": "assistant",
                    **content,
                    "reasoning_content": "Hm.",
                    "tool_calls": [
                        {
                            "id": "x",
                            "type": "function",
                            "function": {"name": "weather", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "x", "content": result},
                *HELLO,
            ]
            for content, result in (
                ({}, "21"),
                ({"content": None}, [{"type": "text", "text": "21"}]),
                ({"content": ""}, ""),
            )
        ),
    ],
)
async def test_every_shape_of_messages(app: Any, messages: Any) -> None:
    reply = await ask(app, {"messages": messages, "tools": [WEATHER]})
    assert reply.status == 200, reply.json


async def test_several_answers(client: openai.AsyncOpenAI) -> None:
    options: Any = {"model": "fake", "messages": said("Both?"), "n": 3, "tools": [WEATHER]}
    whole = await client.chat.completions.create(**options)
    assert whole.usage is not None
    one = await client.chat.completions.create(**{**options, "n": 1})
    assert one.usage is not None
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens
    async with client.chat.completions.stream(**options) as stream:
        async for _ in stream:
            pass
        streamed = await stream.get_final_completion()
    for answer in (whole, streamed):
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            assert len(choice.message.tool_calls or ()) == 2


async def test_seeds_of_several_answers_differ(engine: FakeEngine, app: Any) -> None:
    count = len(engine.requests)
    await last(engine, app, n=3, seed=7)
    assert sorted(request.params.seed for request in engine.requests[count:]) == [7, 8, 9]


async def test_log_probabilities(client: openai.AsyncOpenAI) -> None:
    options: Any = {"model": "fake", "messages": said("Think"), "logprobs": True, "top_logprobs": 1}
    whole = await client.chat.completions.create(**options, max_tokens=5)
    found = whole.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [token.token for token in found.content] == ["It", " is"], "its content's alone"
    assert found.content[0].bytes == [73, 116]
    assert found.content[0].top_logprobs[0].logprob == 0
    stream = await client.chat.completions.create(**options, stream=True)
    tokens = [
        token.token
        async for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert "".join(tokens) == "It is four."


async def test_the_second_turn_is_cached(client: openai.AsyncOpenAI) -> None:
    messages = said("Long")
    first = await client.chat.completions.create(model="fake", messages=messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *HELLO]
    second = await client.chat.completions.create(model="fake", messages=messages)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= first.usage.total_tokens - 1


async def test_an_answer_that_is_cut_off(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fake", messages=said("Both?"), tools=[WEATHER], max_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"
    assert not answer.choices[0].message.tool_calls
