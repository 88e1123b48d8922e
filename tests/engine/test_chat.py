"""Chats through the whole engine: a scripted model says what the test wants to hear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_engine import GenerationResult, SimpleEngine, ToolCall
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
EOS = 257


def saying(text: str) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that leaves one token possible: the next of ``text``, then EOS."""
    script = iter([*make_tokenizer().encode(text, add_special_tokens=False), *[EOS] * 3])

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == next(script), 0.0, -mx.inf)[None]

    return processor


def anonymous(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """Without the ids that the engine has made."""
    return [replace(call, id="") for call in calls]


async def chat(engine: SimpleEngine, text: str, **options: object) -> GenerationResult:
    """Both ways, which must agree."""
    result = await engine.chat(USER, logits_processors=[saying(text)], **options)  # type: ignore[arg-type]
    stream = engine.stream_chat(USER, logits_processors=[saying(text)], **options)  # type: ignore[arg-type]
    async with stream:
        chunks = [chunk async for chunk in stream]
    for segment, whole in (("content", result.text), ("reasoning", result.reasoning)):
        assert "".join(chunk.text for chunk in chunks if chunk.segment == segment) == whole
    raw = "".join(chunk.text for chunk in chunks if chunk.segment == "tool_call")
    assert raw == "".join(call.raw for call in result.tool_calls)
    assert anonymous(stream.result.tool_calls) == anonymous(result.tool_calls)
    ids = [call.id for call in result.tool_calls]
    assert all(ids)
    assert len({*ids}) == len(ids)
    assert stream.result.tokens == result.tokens == tuple(t for c in chunks for t in c.tokens)
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == result.finish_reason
    return result


async def test_reasoning_answer_and_tool_call(engine: SimpleEngine) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    text = f"<think>easy 🙂</think>I shall add.<tool_call>{call}</tool_call>"
    result = await chat(engine, text, tools=[TOOL])
    assert result.reasoning == "easy 🙂"
    assert result.text == "I shall add."
    assert [(c.name, c.arguments, c.error) for c in result.tool_calls] == [("add", {"a": 1}, None)]
    assert result.finish_reason == "tool_calls"
    assert result.tokens[-1] == EOS
    assert result.notes == ()


async def test_a_malformed_call_is_reported_and_the_rest_stands(engine: SimpleEngine) -> None:
    result = await chat(engine, 'a<tool_call>{"name": "add", oops</tool_call>b', tools=[TOOL])
    assert result.text == "ab"
    (call,) = result.tool_calls
    assert call.raw == '{"name": "add", oops'
    assert call.error is not None
    assert result.finish_reason == "stop"


async def test_a_stop_string_across_chunks_never_shows(engine: SimpleEngine) -> None:
    result = await chat(engine, "one\n\nUser: two", stop=["\n\nUser:"])
    assert result.text == "one"
    assert (result.finish_reason, result.stop_string) == ("stop", "\n\nUser:")


async def test_max_tokens_inside_a_held_back_string_lets_it_out(engine: SimpleEngine) -> None:
    result = await chat(engine, "one\n\nUs", stop=["\n\nUser:"], max_tokens=7)
    assert result.text == "one\n\nUs"
    assert (result.finish_reason, result.stop_string) == ("length", None)


async def test_a_stop_string_that_only_the_end_completes(engine: SimpleEngine) -> None:
    result = await chat(engine, "x y", stop=[" "], max_tokens=2)
    assert (result.text, result.finish_reason, result.stop_string) == ("x", "stop", " ")


async def test_a_template_that_opens_reasoning(engine: SimpleEngine) -> None:
    result = await chat(engine, "hm</think>yes", chat_template_kwargs={"enable_thinking": "open"})
    assert (result.reasoning, result.text) == ("hm", "yes")


async def test_generate_gives_markers_as_text(engine: SimpleEngine) -> None:
    text = "<think>x</think>y<tool_call>z"
    result = await engine.generate("p", logits_processors=[saying(text)])
    assert result.text == text
    assert (result.reasoning, result.tool_calls) == ("", ())


async def test_chats_at_once_do_not_mix(engine: SimpleEngine) -> None:
    texts = [f"<think>{n}</think>answer {n}" for n in range(6)]
    results = await asyncio.gather(
        *(engine.chat(USER, logits_processors=[saying(text)]) for text in texts)
    )
    assert [r.text for r in results] == [f"answer {n}" for n in range(6)]
    assert [r.reasoning for r in results] == [str(n) for n in range(6)]
