"""OpenAI's chats, by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion

from mlx_engine import ToolCall
from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine
from tests.server.asgi import ask

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
CALL = FakeAnswer("Let me see.", reasoning="Hm.", tool_calls=[("weather", {"city": "Paris"})])
ANSWERS: dict[str, Any] = {
    "Hello": "Hello there, Ann!",
    "Think": FakeAnswer("It is four.", reasoning="Two and two"),
    "Weather?": CALL,
    "Both?": FakeAnswer(tool_calls=[("weather", {"city": "Paris"}), ("weather", {"city": "Lyon"})]),
    "Wrong?": FakeAnswer(tool_calls=[ToolCall("wether", {}, '{"name": "wether"}', "no such tool")]),
    "Long": "word " * 50,
}


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(ANSWERS, max_batch_size=4, context_length=200) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine: FakeEngine) -> Any:
    return create_app(engine)


@pytest.fixture
async def client(app: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="any", http_client=http, max_retries=0
        )


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
