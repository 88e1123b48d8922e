"""Prompts and chats: what is refused, with which words, and that the engine goes on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_engine import ContextLengthExceeded, InvalidRequest, SimpleEngine
from mlx_engine.generation.tokenize import encode
from mlx_engine.requests import ChatPrompt
from mlx_engine.testing import FakeEngine
from tests.conftest import make_tiny
from tests.tiny import CONTEXT
from tests.waiting import PROMPTLY

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
async def engine(tiny_engine: SimpleEngine) -> AsyncIterator[SimpleEngine]:
    """Whatever a test did to it, the engine serves the next request."""
    async with tiny_engine as engine:
        yield engine
        assert len((await engine.generate([1], max_tokens=2, ignore_eos=True)).tokens) == 2


async def encoded(engine: SimpleEngine, *args: Any) -> Any:
    return encode(ChatPrompt.of(*args), engine._holder.vocabulary)


async def rendered(engine: SimpleEngine, *args: Any) -> str:
    tokens = (await encoded(engine, *args)).tokens
    return str(engine._holder.model().tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "must not be empty"),
        ([], "must not be empty"),
        (None, "a string or a list of token ids, not NoneType"),
        (b"bytes", "not bytes; decode it first"),
        ({"a": 1}, "a string or a list"),
        (5, "a string or a list"),
        ([1, "a"], "must be a token id, 0 or more, not 'a'"),
        ([1, -1], "must be a token id, 0 or more, not -1"),
        ([1.5], "must be a token id, 0 or more, not 1.5"),
        ([True], "must be a token id, 0 or more, not True"),
        ([5, 9999], "token id 9999 is not in the vocabulary of 262 tokens"),
    ],
)
async def test_a_bad_prompt_is_refused(engine: SimpleEngine, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        await engine.generate(prompt)
    assert caught.value.option == "prompt"


async def test_an_mlx_array_is_refused_without_being_read(engine: SimpleEngine) -> None:
    import mlx.core as mx

    array = await engine.run_blocking(lambda: mx.array([1, 2, 3]))
    with pytest.raises(InvalidRequest, match=r"use prompt\.tolist\(\)"):
        await engine.generate(array)  # type: ignore[arg-type]


async def test_token_ids_may_come_in_any_sequence(engine: SimpleEngine) -> None:
    expected = (await engine.generate([65, 66, 67], max_tokens=5)).tokens
    for prompt in ((65, 66, 67), np.array([65, 66, 67]), range(65, 68)):
        assert (await engine.generate(prompt, max_tokens=5)).tokens == expected  # type: ignore[arg-type]


async def test_prompt_and_max_tokens_must_fit_the_context(engine: SimpleEngine) -> None:
    prompt = [1] * (CONTEXT - 100)
    with pytest.raises(ContextLengthExceeded, match=f"{CONTEXT - 100} prompt tokens") as caught:
        await engine.generate(prompt, max_tokens=101)
    assert caught.value.prompt_tokens == CONTEXT - 100
    assert caught.value.max_tokens == 101
    assert caught.value.context_length == CONTEXT
    assert "lower max_tokens to 100" in str(caught.value)
    with pytest.raises(ContextLengthExceeded, match=r"shorten the prompt$"):
        await engine.generate([1] * CONTEXT, max_tokens=None)
    with pytest.raises(ContextLengthExceeded) as caught:
        await engine.chat([{"role": "user", "content": "x" * CONTEXT}])
    assert caught.value.option == "messages"


async def test_ten_megabytes_of_prompt_are_refused_at_once(engine: SimpleEngine) -> None:
    text = "spam " * 2_000_000
    begin = time.monotonic()
    with pytest.raises(ContextLengthExceeded, match="10000000 characters of prompt"):
        await engine.generate(text)
    with pytest.raises(ContextLengthExceeded, match="characters of messages"):
        await engine.chat([{"role": "user", "content": text}])
    assert time.monotonic() - begin < PROMPTLY, "to tokenize them takes minutes"


async def test_text_that_is_a_little_too_long_is_counted_in_tokens(engine: SimpleEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"{CONTEXT + 5} prompt tokens"):
        await engine.generate("x" * (CONTEXT + 5))


async def test_what_is_no_unicode_is_refused(engine: SimpleEngine) -> None:
    with pytest.raises(InvalidRequest, match="prompt: is not valid Unicode"):
        await engine.generate("a\udcff")
    with pytest.raises(InvalidRequest, match=r"number 1 \('user'\) is not valid Unicode"):
        await engine.chat([*USER, {"role": "user", "content": "a\udcff"}])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "must not be empty"),
        ("hi", "must be a list of messages"),
        ({"role": "user"}, "must be a list of messages"),
        (["hi"], "number 0 must be a mapping with a 'role'"),
        ([{"content": "x"}], "number 0 must be a mapping with a 'role'"),
        ([*USER, {"role": "user"}], r"number 1 \('user'\) has no 'content'"),
        ([{"role": "user", "content": 5}], r"number 0 \('user'\): 'content' must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "only text parts",
        ),
        ([{"role": "assistant", "tool_calls": 5}], "'tool_calls' must be a list"),
    ],
)
async def test_bad_messages_are_refused(engine: SimpleEngine, messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        await engine.chat(messages)
    assert caught.value.option == "messages"


async def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    async with SimpleEngine(make_tiny(tmp_path, "--no-chat")) as engine:
        with pytest.raises(InvalidRequest, match=r"no chat template; use generate\(\)"):
            await engine.chat(USER)
        with pytest.raises(InvalidRequest, match="no chat template"):
            async for _ in engine.stream_chat(USER):
                pass
        assert (await engine.generate("hi", max_tokens=2, ignore_eos=True)).text is not None


async def test_the_template_gets_messages_in_its_own_form(engine: SimpleEngine) -> None:
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
        },
        {"role": "user", "content": "sum?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
    ]
    text = await rendered(engine, messages)
    assert "<|im_start|>system\nbe brief<|im_end|>" in text
    assert '"arguments": {"a": 1}' in text
    assert text.endswith("<|im_start|>assistant\n")
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}', "not changed"  # type: ignore[index]


async def test_tools_are_shown_or_refused(engine: SimpleEngine, tmp_path: Path) -> None:
    assert '"name": "f"' in await rendered(engine, USER, [TOOL])
    with pytest.raises(InvalidRequest, match="tools: must be a list"):
        await engine.chat(USER, tools=TOOL)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="tools: number 0 must be"):
        await engine.chat(USER, tools=["f"])  # type: ignore[list-item]
    template = engine._holder.model().tokenizer
    original = template.chat_template
    template.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        with pytest.raises(InvalidRequest, match="does not show tools"):
            await engine.chat(USER, tools=[TOOL])
    finally:
        template.chat_template = original


async def test_template_options_have_an_effect_or_are_noted(engine: SimpleEngine) -> None:
    plain = await encoded(engine, USER)
    thinking = await encoded(engine, USER, None, {"enable_thinking": "open"})
    assert (plain.parser().in_reasoning, thinking.parser().in_reasoning) == (False, True)
    options = {"colour": "red", "enable_thinking": True}
    result = await engine.chat(USER, max_tokens=2, chat_template_kwargs=options)
    assert result.notes == ("chat_template_kwargs: this chat template does not look at colour",)
    for bad in ({"tools": []}, {"tokenize": False}, [1], {1: 2}):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            await engine.chat(USER, chat_template_kwargs=bad)  # type: ignore[arg-type]


async def test_a_marker_written_by_a_user_does_not_open_reasoning(engine: SimpleEngine) -> None:
    messages = [{"role": "user", "content": "what does <think> mean"}]
    assert not (await encoded(engine, messages)).parser().in_reasoning


async def test_a_template_that_raises_is_the_requests_fault(engine: SimpleEngine) -> None:
    tokenizer = engine._holder.model().tokenizer
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(InvalidRequest, match="roles must alternate"):
            await engine.chat(USER)
    finally:
        tokenizer.chat_template = original


async def test_unknown_options_name_the_closest(engine: SimpleEngine) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        await engine.generate("hi", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="did you mean 'max_tokens'"):
        engine.stream_chat(USER, max_token=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="did you mean 'tool_choice'"):
        await engine.chat(USER, tool_choise="none")  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="did you mean 'priority'"):
        await engine.generate_batch(["hi"], prioritiy=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^temperature: there is no such option"):
        await engine.count_tokens(USER, temperature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "'text' .*, not None"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text' .*, not None"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "'text' .*, not 5"),
        ({"role": "user", "content": [{"type": "text", "text": ["a"]}]}, "'text' .*"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "'content' must be text"),
        ({"role": "user", "content": b"bytes"}, "only text parts"),
        ({"role": "assistant", "tool_calls": ["f"]}, "a tool call must be a mapping"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "a tool call must be a mapping"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "name of a function .* None"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": None}}]},
            "name of a function .* None",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            "arguments of a tool call must be a mapping",
        ),
    ],
)
async def test_nothing_that_is_no_text_is_made_into_words(
    engine: SimpleEngine, message: dict[str, Any], words: str
) -> None:
    role = message["role"]
    for asked in (engine, FakeEngine()):
        with pytest.raises(InvalidRequest, match=rf"^messages: number 1 \('{role}'\): .*{words}"):
            asked.stream_chat([USER[0], message])


async def test_a_past_call_without_arguments_has_none(engine: SimpleEngine) -> None:
    def past(**arguments: Any) -> list[Any]:
        return ChatPrompt.of(
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", **arguments}}]}]
        ).messages

    for arguments in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
        assert past(**arguments)[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
