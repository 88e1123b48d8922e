"""Conversations at the door: one form for all that mean the same, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine import InvalidRequest, RequestLimits, SamplingParams
from mlx_engine.requests import ChatPrompt

USER = {"role": "user", "content": "hi"}


def of(*messages: Any, **options: Any) -> list[dict[str, Any]]:
    return ChatPrompt.of([USER, *messages], **options).messages[1:]


def past(arguments: Any) -> Any:
    function = {"name": "f", "arguments": arguments}
    (message,) = of({"role": "assistant", "tool_calls": [{"function": function}]})
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('{"a": 1}', {"a": 1}),
        (' {"a": 1} ', {"a": 1}),
        ("null", {}),
        ("", {}),
        ("  ", {}),
        (None, {}),
        ({"a": "b"}, {"a": "b"}),
        ('{"a": "b', '{"a": "b'),
        ("[1]", "[1]"),
        ("5", "5"),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
    ],
)
def test_arguments_are_a_mapping_or_what_they_were(given: Any, kept: Any) -> None:
    assert past(given) == kept
    assert past(kept) == kept, "what was checked once is checked again elsewhere"


def test_names_of_old_and_of_others() -> None:
    call = {"name": "f", "arguments": "{}"}
    old = of(
        {"role": "assistant", "content": None, "function_call": call, "refusal": None},
        {"role": "function", "name": "f", "content": "x"},
    )
    assert old == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "name": "f", "content": "x"},
    ]
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert of({"role": "assistant", name: "hm"}) == [
            {"role": "assistant", "content": "", "reasoning_content": "hm"}
        ]
    assert of({"role": "assistant", "content": "x", "tool_calls": [], "reasoning": None}) == [
        {"role": "assistant", "content": "x"}
    ]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "system"}, r"\('system'\) has no 'content'"),
        ({"role": "developer", "content": None}, r"\('developer'\) has no 'content'"),
        ({"role": "tool", "content": object()}, "text or a JSON value"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "'tool_call_id' must be text"),
        ({"role": "tool", "content": "x", "name": []}, "'name' must be text"),
        ({"role": "assistant", "reasoning": {"a": 1}}, "'reasoning' must be text"),
        (
            {"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}]},
            "id of a tool call must be text",
        ),
    ],
)
def test_what_is_refused_is_named(message: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^messages: number 1 .*{words}"):
        of(message)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thinking": "yes"}, "thinking: must be True or False"),
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens: must be an integer, 0 or more"),
        ({"max_reasoning_tokens": 1.5}, "max_reasoning_tokens: must be an integer"),
        ({"continue_final_message": 1}, "continue_final_message: must be True or False"),
        ({"tool_choice": "required"}, "tool_choice: 'required' needs tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice: must be .* not"),
        ({"tool_choice": "any"}, "tool_choice: must be 'auto', 'none', 'required' or"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls: must be True or False"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{words}"):
        ChatPrompt.of([USER], **options)


_CHOSEN = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("required", "required"),
        (_CHOSEN, _CHOSEN),
        ({"type": "function", "name": "f"}, _CHOSEN),  # as in OpenAI's responses
        ({"function": {"name": "f", "strict": True}}, _CHOSEN),
    ],
)
def test_a_tool_that_must_be_called_is_named_in_one_form(given: Any, kept: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    prompt = ChatPrompt.of([USER], tools, tool_choice=given)
    assert (prompt.tool_choice, prompt.offered) == (kept, tools)
    again = ChatPrompt.of([USER], tools, tool_choice=prompt.tool_choice)
    assert again == prompt


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"type": "function", "function": {"name": "g"}}, "there is no tool 'g'; there are f"),
        ({"type": "custom", "name": "f"}, "must be {'type': 'function'"),
        ({"type": "function", "function": {"name": 3}}, "must be {'type': 'function'"),
    ],
)
def test_a_choice_that_names_no_tool_is_refused(given: Any, words: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(InvalidRequest, match=f"^tool_choice: {words}"):
        ChatPrompt.of([USER], tools, tool_choice=given)


def test_options_have_defaults() -> None:
    prompt = ChatPrompt.of([USER], tool_choice=None, parallel_tool_calls=None)
    assert prompt == ChatPrompt.of([USER])
    assert (prompt.tool_choice, prompt.parallel_tool_calls) == ("auto", True)
    assert (prompt.thinking, prompt.max_reasoning_tokens) == (None, None)
    tool = {"type": "function", "function": {"name": "f"}}
    assert ChatPrompt.of([USER], [tool], tool_choice="none").offered is None


@pytest.mark.parametrize(
    "content", ["a\udcff", 10**5000, "x" * 1001], ids=["half", "digits", "long"]
)
def test_a_message_that_is_wrong_by_itself_is_named(content: Any) -> None:
    limits = RequestLimits(text_characters=1000)
    with pytest.raises(InvalidRequest, match=r"^messages: number 1 \('tool'\) "):
        ChatPrompt.of([USER, {"role": "tool", "content": content}], limits=limits)
    with pytest.raises(InvalidRequest, match=r"^messages: has at least 12\d\d characters"):
        ChatPrompt.of([{"role": "user", "content": "x" * 400}] * 3, limits=limits)


def test_what_is_too_large_is_refused_by_the_limits_name() -> None:
    limits = RequestLimits(text_characters=100, tool_calls=2, messages=5, tools=1)
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    call = {"function": {"name": "f"}}
    cases: list[tuple[Any, str]] = [
        ([USER] * 6, "messages"),
        ([{"role": "tool", "content": {"a": "x" * 200}}], "text_characters"),
        ([{"role": "tool", "content": ["\n" * 60]}], "text_characters"),
        ([{"role": "tool", "content": deep}], "nesting"),
        ([{"role": "assistant", "reasoning": "x" * 101}], "text_characters"),
        ([{"role": "assistant", "tool_calls": [call] * 3}], "tool_calls"),
    ]
    for messages, name in cases:
        with pytest.raises(InvalidRequest, match=rf"RequestLimits\.{name}"):
            ChatPrompt.of(messages, limits=limits)
    with pytest.raises(InvalidRequest, match=r"tools: .*RequestLimits\.tools"):
        ChatPrompt.of([USER], [{"name": "f"}] * 2, limits=limits)
    with pytest.raises(InvalidRequest, match=r"stop: .*RequestLimits\.stop_characters"):
        limits.params(None, {"stop": "x" * 8_000_000})
    with pytest.raises(InvalidRequest, match=r"stop: .*RequestLimits\.stop\)"):
        limits.params(SamplingParams(stop=["x"] * 100), {})


def test_arguments_of_all_calls_are_counted_before_they_are_read() -> None:
    """A client's megabytes cost their length, whatever is in them."""

    def calling(*arguments: str) -> list[dict[str, Any]]:
        calls = [{"function": {"name": "f", "arguments": text}} for text in arguments]
        return [USER, {"role": "assistant", "tool_calls": calls}]

    many = '{"a": [' + "0, " * 200_000 + "0]}"
    for arguments in ((many, many), ('["a",' * 600_000,), ("[[],[" * 200_000,)):
        with pytest.raises(InvalidRequest, match=r"number 1 .*RequestLimits\.values"):
            ChatPrompt.of(calling(*arguments))
    quoted = '{"a": "' + '\\",[{' * 100_000 + '"}'
    (call,) = ChatPrompt.of(calling(quoted)).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"a": '",[{' * 100_000}
    # Where each quotation mark could begin a string that has no end.
    endless = '"\\' * 500_000 + "," * 300_000
    (call,) = ChatPrompt.of(calling(endless)).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == endless
