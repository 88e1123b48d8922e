"""FakeEngine's tool calls and reasoning: as an application sees those of a real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_engine import GenerationChunk, GenerationError, InvalidRequest, StreamConsumed, ToolCall
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest, ScriptError

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "What is the weather?"}]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


TOOLS = [tool("weather"), tool("time")]
CUT = ToolCall("weather", raw='{"name": "weather", "argum', error="it was cut off")


@pytest.fixture(params=[None, 4], ids=["alone", "batch"])
def width(request: pytest.FixtureRequest) -> Any:
    return request.param


async def streamed(engine: FakeEngine, **options: Any) -> tuple[list[GenerationChunk], Any]:
    options.setdefault("tools", TOOLS)
    async with engine.stream_chat(USER, **options) as stream:
        chunks = [chunk async for chunk in stream]
    return chunks, stream.result


def put_together(chunks: list[GenerationChunk]) -> list[dict[str, Any]]:
    """Calls as a client of OpenAI's API puts them together."""
    calls: list[dict[str, Any]] = []
    for delta in (chunk.tool_call for chunk in chunks if chunk.tool_call is not None):
        if delta.id is not None:
            assert delta.index == len(calls)
            calls.append({"id": delta.id, "name": delta.name, "arguments": "", "error": None})
        calls[delta.index]["arguments"] += delta.arguments
        calls[delta.index]["error"] = delta.error
    return calls


async def test_calls_come_as_deltas_name_first(width: Any) -> None:
    given: Any = [("weather", {"city": "São Paulo", "days": [1, 2]}), ("time", {})]
    answer = FakeAnswer("I look.", reasoning="Let me think.", tool_calls=given)
    async with FakeEngine(answer, max_batch_size=width) as engine:
        chunks, result = await streamed(engine)
    assert (result.text, result.reasoning) == ("I look.", "Let me think.")
    assert result.finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert [(call.name, call.arguments, call.ok) for call in result.tool_calls] == [
        (*one, True) for one in given
    ]
    calls = put_together(chunks)
    assert [json.loads(call["arguments"]) for call in calls] == [one[1] for one in given]
    assert [call["id"] for call in calls] == [call.id for call in result.tool_calls]
    assert [call["name"] for call in calls] == ["weather", "time"]
    assert len({*(call.id for call in result.tool_calls)}) == 2
    first = next(chunk.tool_call for chunk in chunks if chunk.tool_call is not None)
    assert (first.name, first.arguments) == ("weather", ""), "the name comes before arguments"
    assert "".join(chunk.text for chunk in chunks if chunk.tool_call) == "".join(
        call.raw for call in result.tool_calls
    )
    assert "".join(chunk.content for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning
    assert tuple(token for chunk in chunks for token in chunk.tokens) == result.tokens


async def test_a_malformed_call_has_its_error_and_ends_by_stop(width: Any) -> None:
    async with FakeEngine(FakeAnswer(tool_calls=[CUT]), max_batch_size=width) as engine:
        chunks, result = await streamed(engine)
        (call,) = result.tool_calls
        assert (call.name, call.error, call.raw) == ("weather", CUT.error, CUT.raw)
        assert call.id
        assert result.finish_reason == "stop"
        assert put_together(chunks)[0]["error"] == CUT.error
        both, whole = await streamed(engine, max_tokens=2)
    assert whole.finish_reason == "length"
    assert put_together(both)[0]["error"] == whole.tool_calls[0].error is not None


async def test_a_bad_call_beside_a_good_one_leaves_it_alone() -> None:
    async with FakeEngine(FakeAnswer(tool_calls=[CUT, ("time", {})])) as engine:
        result = await engine.chat(USER, tools=TOOLS)
    assert [call.ok for call in result.tool_calls] == [False, True]
    assert result.finish_reason == "tool_calls"


async def test_max_tokens_within_a_call_makes_it_incomplete(width: Any) -> None:
    answer = FakeAnswer(tool_calls=[("weather", {"city": "Paris", "days": 3})])
    async with FakeEngine(answer, max_batch_size=width) as engine:
        chunks, result = await streamed(engine, max_tokens=3)
    (call,) = result.tool_calls
    assert (call.name, call.ok, call.arguments) == ("weather", False, {})
    assert call.raw == "".join(chunk.text for chunk in chunks)
    assert put_together(chunks)[0]["error"] == call.error
    assert result.finish_reason == "length"


async def test_a_stop_string_within_a_call_ends_the_answer() -> None:
    answer = FakeAnswer(tool_calls=[("weather", {"city": "Paris"})])
    async with FakeEngine(answer) as engine:
        _, result = await streamed(engine, stop=["Paris"])
    assert result.finish_reason == "stop"
    assert [call.ok for call in result.tool_calls] == [False]


@pytest.mark.parametrize("stop", ['{"name', "Paris", "ris", '"}}', "never", "x}"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 99])
async def test_each_chunk_of_a_call_has_a_delta(stop: str, count: int) -> None:
    answer = FakeAnswer("Yes.", tool_calls=[("weather", {"city": "Paris"}), ("time", {})])
    async with FakeEngine(answer) as engine:
        chunks, result = await streamed(engine, stop=[stop], max_tokens=count)
    for chunk in chunks:
        assert (chunk.segment == "tool_call") == (chunk.tool_call is not None)
    calls = put_together(chunks)
    assert [(call["id"], call["name"] or "", call["error"]) for call in calls] == [
        (call.id, call.name, call.error) for call in result.tool_calls
    ]


async def test_ids_are_unique_in_a_conversation() -> None:
    async with FakeEngine(FakeAnswer(tool_calls=[("time", {})])) as engine:
        results = [await engine.chat(USER, tools=TOOLS) for _ in range(5)]
        given = FakeAnswer(tool_calls=[ToolCall("time", id="mine00001")])
    assert len({result.tool_calls[0].id for result in results}) == 5
    async with FakeEngine(given) as engine:
        (call,) = (await engine.chat(USER, tools=TOOLS)).tool_calls
    assert (call.id, call.raw) == ("mine00001", '{"name": "time", "arguments": {}}')


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tools": None}, "the request has no tools to be called"),
        ({"tool_choice": "none"}, "the request has no tools to be called"),
        (
            {"tools": [tool("other")]},
            "a call of 'weather' is scripted.*ToolCall.name='weather', error=",
        ),
    ],
)
async def test_a_script_that_no_model_could_follow_is_a_mistake(options: Any, problem: str) -> None:
    answer = FakeAnswer(tool_calls=[("weather", {}), ("time", {})])
    with pytest.raises(ScriptError, match=problem):
        async with FakeEngine(answer) as engine:
            await streamed(engine, **options)


async def test_one_call_is_taken_where_more_are_not_wanted() -> None:
    answer = FakeAnswer(tool_calls=[CUT, ("weather", {}), ("time", {})])
    async with FakeEngine(answer) as engine:
        chunks, result = await streamed(engine, parallel_tool_calls=False)
    assert [call.ok for call in result.tool_calls] == [False, True, False]
    assert [call["error"] for call in put_together(chunks)] == [c.error for c in result.tool_calls]
    assert result.tool_calls[2].arguments == {}


async def test_tools_and_roles_are_checked_as_by_real_engines() -> None:
    async with FakeEngine() as engine:
        wrong: Any
        for wrong in ([{"oops": 1}], [{"name": "f"}], [{"type": "function"}], ["f"]):
            with pytest.raises(InvalidRequest, match=r"^tools: "):
                await engine.chat(USER, tools=wrong)
        with pytest.raises(InvalidRequest, match=r"^messages: number 0 \('robot'\)"):
            await engine.chat([{"role": "robot", "content": "x"}])


async def test_a_model_without_tools_or_reasoning() -> None:
    async with FakeEngine(
        FakeAnswer("x", reasoning="y"), supports_tools=False, supports_reasoning=False
    ) as engine:
        assert (engine.supports_tools, engine.supports_reasoning) == (False, False)
        with pytest.raises(InvalidRequest, match=r"^tools: "):
            await engine.chat(USER, tools=TOOLS)
        with pytest.raises(InvalidRequest, match=r"^thinking: .* has no reasoning"):
            await engine.chat(USER, thinking=True)
        with pytest.raises(ScriptError, match="supports_reasoning is False"):
            await engine.chat(USER)
        with pytest.raises(ScriptError, match="supports_reasoning is False"):
            engine.check_script()


async def test_options_of_a_chat_are_shown() -> None:
    def answer(request: FakeRequest) -> str:
        return f"{request.thinking} {request.tool_choice} {request.max_reasoning_tokens}"

    async with FakeEngine(answer, model="mine") as engine:
        result = await engine.chat(
            USER, thinking=False, tool_choice="none", tools=TOOLS, max_reasoning_tokens=5
        )
        assert result.text == "False none 5"
        assert engine.model == "mine"
        assert engine.requests[0].tools == TOOLS
        continued = [*USER, {"role": "assistant", "content": "It"}]
        await engine.chat(continued, continue_final_message=True)
        assert engine.requests[1].continue_final_message


async def test_reasoning_is_closed_when_its_tokens_are_used_up() -> None:
    async with FakeEngine(FakeAnswer("Yes.", reasoning="one two three four")) as engine:
        chunks, result = await streamed(engine, max_reasoning_tokens=2)
        assert (result.reasoning, result.text) == ("one two", "Yes.")
        assert "".join(chunk.reasoning for chunk in chunks) == "one two"


async def test_an_agent_loop() -> None:
    answers = iter(
        [
            FakeAnswer("Let me see.", tool_calls=[("weather", {"city": "Paris"}), CUT]),
            FakeAnswer("It is sunny."),
        ]
    )
    messages: list[Any] = [*USER]
    async with FakeEngine(answers) as engine:
        while True:
            result = await engine.chat(messages, tools=TOOLS)
            messages.append(result)
            messages += [
                call.reply({"sky": "blue"} if call.ok else f"error: {call.error}")
                for call in result.tool_calls
            ]
            if result.finish_reason != "tool_calls":
                break
        assert result.text == "It is sunny."
        seen = engine.requests[1].messages
    assert seen is not None
    assert [message["role"] for message in seen] == ["user", "assistant", "tool", "tool"]
    ids = [call["id"] for call in seen[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in seen[2:]] == ids
    assert [message["content"] for message in seen[2:]] == [
        '{"sky": "blue"}',
        "error: it was cut off",
    ]


# Text alone


async def test_text_of_a_stream_is_for_whoever_reads_the_answer(width: Any) -> None:
    answer = FakeAnswer(["It", " is", " sunny."], reasoning="hm", tool_calls=[("time", {})])
    async with FakeEngine(answer, max_batch_size=width) as engine:
        async with engine.stream_chat(USER, tools=TOOLS) as stream:
            texts = [text async for text in stream.text()]
        assert texts == ["It", " is", " sunny."]
        assert stream.result.reasoning == "hm"
        bare = engine.stream_chat(USER, tools=TOOLS)
        assert "".join([text async for text in bare.text()]) == "It is sunny."


async def test_text_reads_the_stream_once() -> None:
    async with FakeEngine("a b") as engine:
        stream = engine.stream_generate("x")
        assert [text async for text in stream.text()] == ["a", " b"]
        with pytest.raises(StreamConsumed):
            async for _ in stream.text():
                pass
        with pytest.raises(StreamConsumed):
            async for _ in stream:
                pass


async def test_text_raises_what_the_stream_raises() -> None:
    async with FakeEngine(["a", GenerationError("boom")]) as engine:
        texts = engine.stream_generate("x").text()
        assert await anext(texts) == "a"
        with pytest.raises(GenerationError, match="boom"):
            await anext(texts)


@pytest.mark.parametrize(
    "calls", ["weather", ToolCall("weather"), [("weather", {"a": {1}})], [("weather", "{}")], [5]]
)
def test_calls_of_a_script_are_checked(calls: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^tool_calls: "):
        FakeAnswer(tool_calls=calls)
