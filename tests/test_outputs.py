"""What engines give back, as an application uses it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from mlx_engine import GenerationChunk, GenerationResult, InvalidRequest, ToolCall
from mlx_engine.limits import DEFAULT_LIMITS
from mlx_engine.outputs import RenderedChat, Timings, TokenLogprob, Usage
from mlx_engine.requests import ChatPrompt

USER = {"role": "user", "content": "Weather?"}
CALL = ToolCall("weather", {"city": "Zürich"}, '{"name": "weather"...', id="call00001")
CUT = ToolCall("weather", {}, '{"name": "weather", "argum', error="it is cut off", id="call00002")


def result(**fields: Any) -> GenerationResult:
    timings = Timings(0, 0, 0, 0, 0, 0, 0)
    return GenerationResult(**{"text": "", "tokens": (), "finish_reason": "stop"} | fields,
                            usage=Usage(1, 1), timings=timings)  # fmt: skip


def test_a_plain_answer_is_a_message() -> None:
    assert result(text="Hi").message() == {"role": "assistant", "content": "Hi"}


def test_reasoning_and_calls_are_in_the_message_as_openai_has_them() -> None:
    message = result(text="I look.", reasoning="Hm.", tool_calls=(CALL,)).message()
    (call,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."}
    assert (call["id"], call["type"]) == ("call00001", "function")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Zürich"}'}
    json.dumps(message)


def test_a_call_that_came_out_wrong_goes_back_as_the_model_wrote_it() -> None:
    (call,) = result(tool_calls=(CUT,)).message()["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": CUT.raw}
    assert not CUT.ok
    assert CALL.ok


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("21 degrees", "21 degrees"),
        ("", ""),
        ({"ü": [1, None]}, '{"ü": [1, null]}'),
        (21, "21"),
        (None, "null"),
        ([{"a": 1}], '[{"a": 1}]'),
    ],
)
def test_a_reply_is_text_or_any_json_value(content: object, text: str) -> None:
    reply = CALL.reply(content)
    assert reply == {
        "role": "tool",
        "tool_call_id": "call00001",
        "name": "weather",
        "content": text,
    }


@pytest.mark.parametrize("content", [object(), {1, 2}, b"x", {"a": object()}])
def test_what_json_has_no_form_for_is_refused_by_name(content: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^content: must be text, or have a form in JSON"):
        CALL.reply(content)


def test_a_result_stands_among_the_messages_itself() -> None:
    answer = result(text="Let me see.", tool_calls=(CALL, CUT))
    replies = [CALL.reply("sun"), CUT.reply("error: it is cut off")]
    itself = ChatPrompt.of([USER, answer, *replies], None, None, DEFAULT_LIMITS)
    spelled = ChatPrompt.of([USER, answer.message(), *replies], None, None, DEFAULT_LIMITS)
    assert itself == spelled
    assert [message["role"] for message in itself.messages] == ["user", "assistant", "tool", "tool"]


def test_a_chunk_is_content_or_reasoning_or_neither() -> None:
    kinds: dict[Any, tuple[str, str]] = {
        "content": ("x", ""),
        "reasoning": ("", "x"),
        "tool_call": ("", ""),
    }
    for segment, both in kinds.items():
        chunk = GenerationChunk("x", segment=segment)
        assert (chunk.content, chunk.reasoning) == both


FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ([{"oops": 1}], "number 0 must be"),
        ([FUNCTION], "number 0 must be"),
        ([{"type": "function", "function": FUNCTION}, "f"], "number 1 must be"),
        ([{"type": "web_search", "function": FUNCTION}], "number 0 must be"),
        ([{"type": "function", "function": {"parameters": {}}}], "number 0 has no name"),
        ([{"type": "function", "function": {"name": ""}}], "number 0 has no name"),
        ([{"type": "function", "function": {"name": "f", "parameters": 5}}], "'parameters' must"),
    ],
)
def test_tools_of_the_wrong_shape_are_refused(tools: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^tools: .*{problem}"):
        ChatPrompt.of([USER], tools)


def test_tools_of_the_right_shape_are_taken() -> None:
    for tool in ({"type": "function", "function": FUNCTION}, {"function": {"name": "f"}}):
        assert ChatPrompt.of([USER], [tool]).tools == [tool]


def test_a_role_that_does_not_exist_is_refused_with_the_number_of_the_message() -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: number 1 \('usr'\): there is no such"):
        ChatPrompt.of([USER, {"role": "usr", "content": "x"}])
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        ChatPrompt.of([{"role": role, "content": "x", "name": "f"}])


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "f"}, "tool_choice"),
        ({"thinking": "yes"}, "thinking"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_options_of_a_chat_are_refused_by_name(options: Any, option: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatPrompt.of([USER], **options)
    assert caught.value.option == option


def test_a_result_as_plain_data() -> None:
    best = TokenLogprob(8, float("-inf"), (), "b", b"b")
    logprobs = (TokenLogprob(7, -0.5, (best,), "a", b"a"),)
    made = result(text='{"x": [1, 2.5]}', tokens=(7, 2), tool_calls=(CALL, CUT), logprobs=logprobs)
    plain = replace(made, parsed=object()).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert "tokens" not in plain
    assert plain["parsed"] == {"x": [1, 2.5]}
    assert plain["usage"]["prompt_tokens"] == 1
    assert plain["tool_calls"][0]["arguments"] == {"city": "Zürich"}
    assert plain["logprobs"][0]["top"][0] == {
        "token": 8, "logprob": None, "top": [], "text": "b", "bytes": [98]
    }  # fmt: skip
    with_tokens = made.to_dict(tokens=True)
    assert (with_tokens["tokens"], with_tokens["parsed"]) == ([7, 2], None)
    assert with_tokens.keys() == {field.name for field in fields(GenerationResult)}


def test_a_short_repr() -> None:
    logprobs = (TokenLogprob(7, -0.5),) * 20
    shown = repr(result(text="x" * 1000, tokens=tuple(range(1000)), logprobs=logprobs))
    assert len(shown) < 600
    assert shown.startswith("GenerationResult(text='xxx")
    assert "... (1000 characters), tokens=<1000>, finish_reason='stop'" in shown
    assert "logprobs=<20>" in shown
    assert "tool_calls" not in shown
    assert repr(RenderedChat("Hi", (1, 2, 3), 2)) == (
        "RenderedChat(text='Hi', tokens=(1, 2, 3), cached_tokens=2)"
    )
    assert "prefill=0.3333, " in repr(Timings(0, 1 / 3, 0, 0, 0, 0, 0))
