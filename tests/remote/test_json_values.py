"""What an engine elsewhere answers comes back to it as it was said, and so does all else."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_engine import InvalidRequest, ProcessEngine, SamplingParams, ToolCall
from mlx_engine.limits import DEFAULT_LIMITS
from mlx_engine.remote.remote_request import NOTHING
from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.messages import (
    Done,
    Generate,
    decode_from_client,
    decode_from_server,
    encode,
)
from mlx_engine.remote.wire.values import (
    request_from_wire,
    request_to_wire,
    result_from_wire,
    result_to_wire,
)
from mlx_engine.requests import ChatPrompt, GenerationRequest

HUGE = 123456789012345678901234567890
USER = {"role": "user", "content": "hi"}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**4299), max_value=10**4299)
    | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**4299, 0])
    | st.floats()
    | st.text()
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


def exactly(value: Any) -> str:
    """A text that only the same values have: nan is nan, and 1 is neither 1.0 nor True."""
    return json.dumps(value, ensure_ascii=False, sort_keys=False)


def there(chat: ChatPrompt) -> ChatPrompt:
    """A chat as it arrives in the process of an engine."""
    ask = GenerationRequest(chat, SamplingParams())
    payload = request_to_wire(1, ask, name="", stream=False, progress=False)
    (message,) = decode_from_client(payload)
    assert isinstance(message, Generate)
    arrived = request_from_wire(message, trusted=True, limits=DEFAULT_LIMITS).source
    assert isinstance(arrived, ChatPrompt)
    return arrived


def back(call: ToolCall) -> ToolCall:
    """A call as it arrives at the caller of an engine elsewhere."""
    payload = encode([result_to_wire(1, replace(NOTHING, tool_calls=(call,)))])
    (done,) = decode_from_server(payload)
    assert isinstance(done, Done)
    return result_from_wire(done).tool_calls[0]


@settings(deadline=None)
@given(OBJECTS)
def test_what_a_model_calls_with_can_be_told_to_it_again(arguments: dict[str, Any]) -> None:
    parsed = json.loads(json.dumps(arguments))  # as parsers do
    told = back(ToolCall("f", parsed, "raw"))
    assert told.error is None
    assert exactly(told.arguments) == exactly(parsed)
    for form in (told.arguments, json.dumps(told.arguments)):
        past = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": form}}]}
        chat = ChatPrompt.of([USER, past])
        assert exactly(chat.messages[1]["tool_calls"][0]["function"]["arguments"]) == exactly(
            parsed
        )
        assert exactly(there(chat).messages) == exactly(chat.messages)


@settings(deadline=None)
@given(OBJECTS, OBJECTS)
def test_tools_and_template_variables_arrive_as_they_were(
    tool: dict[str, Any], variable: dict[str, Any]
) -> None:
    chat = ChatPrompt.of([USER], [{"function": {"name": "f"}, "parameters": tool}], {"v": variable})
    arrived = there(chat)
    assert exactly(arrived.tools) == exactly(chat.tools)
    assert exactly(arrived.template_kwargs) == exactly(chat.template_kwargs)


@pytest.mark.parametrize("option", ["messages", "tools", "chat_template_kwargs"])
@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (object(), "the type object"),
        ({1, 2}, "the type set"),
        (b"bytes", "the type bytes"),
        ({(1, 2): 3}, r"the key \(1, 2\)"),
        ({HUGE: 3}, f"the key {HUGE}"),
    ],
)
def test_what_cannot_travel_is_told_by_the_option_that_it_is_in(
    option: str, odd: Any, words: str
) -> None:
    tool = {"function": {"name": "f"}}
    parts: dict[str, Any] = {"messages": USER, "tools": tool, "chat_template_kwargs": {}}
    parts[option] = {**parts[option], "odd": odd}
    chat = ChatPrompt.of([parts["messages"]], [parts["tools"]], parts["chat_template_kwargs"])
    with pytest.raises(InvalidRequest, match=f"^{option}: .*cannot go to another process.*{words}"):
        there(chat)


def test_what_is_too_deep_to_travel_is_told_by_its_option() -> None:
    inner: Any = []
    for _ in range(450):
        inner = [inner]
    endless = replace(DEFAULT_LIMITS, nesting=None)
    chat = ChatPrompt.of([USER], [{"function": {"name": "f"}, "deep": inner}], None, endless)
    with pytest.raises(InvalidRequest, match=r"^tools: .*cannot go to another process"):
        there(chat)


def test_a_request_that_is_too_long_is_told_by_its_largest_part() -> None:
    for option in ("messages", "tools", "chat_template_kwargs"):
        texts = {name: "x" * (5000 if name == option else 1) for name in ("messages", "tools")}
        kwargs = {"a": "x" * 5000} if option == "chat_template_kwargs" else {}
        chat = ChatPrompt.of(
            [{"role": "user", "content": texts["messages"]}],
            [{"function": {"name": "f", "description": texts["tools"]}}],
            kwargs,
        )
        with pytest.raises(InvalidRequest, match=rf"^{option}: takes \d+ bytes .* 3000 may"):
            request_to_wire(
                1,
                GenerationRequest(chat, SamplingParams()),
                name="",
                stream=False,
                progress=False,
                limit=3000,
            )


def test_extensions_of_others_are_no_messages() -> None:
    import msgspec

    for code, data in ((2, b"\1"), (-1, b"\0\0\0\0")):
        chat = [[], None, {"a": msgspec.msgpack.Ext(code, data)}, {}]
        payload = msgspec.msgpack.encode(
            [["generate", 1, None, chat, {}, 0, None, None, False, False]]
        )
        try:
            (message,) = decode_from_client(payload)
        except WireError:
            continue
        with pytest.raises(InvalidRequest):  # msgpack's own, a time
            request_from_wire(message, trusted=False, limits=DEFAULT_LIMITS)  # type: ignore[arg-type]


def test_what_a_parser_makes_that_no_json_has_arrives_spelled_out() -> None:
    call = back(ToolCall("f", {"a": {1}, "b": (1, b"x"), "c": "\ud800", 5: 1j}, "raw"))
    assert call.error is None
    assert call.arguments == {"a": "{1}", "b": [1, "b'x'"], "c": "\\ud800", 5: "1j"}
    lost = back(ToolCall("f", {"a": 16 ** sys.get_int_max_str_digits()}, "raw"))
    assert lost.arguments == {}
    assert "no JSON" in str(lost.error)
    assert len(str(lost.error)) < 300


@pytest.mark.anyio
async def test_a_past_call_of_a_process_engine_is_history_that_it_takes(tiny_path: Path) -> None:
    arguments = {"n": HUGE, "deep": [{"x": -HUGE, "f": [0.5, True, None, "żółć 🙂"]}]}
    async with ProcessEngine(tiny_path) as engine:
        past = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": None}}]}
        lengths = []
        for form in (arguments, json.dumps(arguments)):
            past["tool_calls"][0]["function"]["arguments"] = form  # type: ignore[index]
            result = await engine.chat(
                [USER, past, USER],
                tools=[{"function": {"name": "f", "maximum": HUGE}}],
                max_tokens=1,
            )
            lengths.append(result.usage.prompt_tokens)
    assert lengths[0] == lengths[1]
