"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import GenerationChunk, GenerationResult, ToolCall
from mlx_engine.server.answers import Answer
from mlx_engine.server.api import event
from mlx_engine.server.asked import MOST_CHOICES, Asked, Fields, reasoning, switched
from mlx_engine.server.call_deltas import CallDeltas
from mlx_engine.server.failures import Failure
from mlx_engine.server.field_table import CHAT, quiet
from mlx_engine.server.openai_values import (
    MOST_LOGPROBS,
    content_logprobs,
    error_body,
    new_id,
    now,
    sampling,
    usage_of,
    wants_usage,
)

_CHAT = ("parallel_tool_calls", "max_reasoning_tokens", "continue_final_message")


class ChatCompletions:
    """The API."""

    name = "chat.completions"
    table = CHAT
    counts_first = False

    def read(self, fields: Fields) -> Asked:
        """See ``Api``."""
        model = fields.text("model") or ""
        messages = fields.take("messages")
        options = sampling(fields)
        top = fields.integer("top_logprobs", 0, low=0, high=MOST_LOGPROBS)
        if fields.flag("logprobs"):
            options["logprobs"] = top
        elif top:
            raise InvalidRequest("top_logprobs", "needs logprobs, true")
        chat = {**_thinking(fields), **fields.options(_CHAT)}
        if variables := fields.mapping("chat_template_kwargs"):
            chat["chat_template_kwargs"] = variables
        effort = fields.mapping("reasoning").get("effort")
        chat = reasoning(fields.take("reasoning_effort", effort), chat)
        tools, skipped = functions(fields.take("tools"))
        chat |= _choice_of(tools, fields.take("tool_choice"))
        usage, others = wants_usage(fields)
        return Asked(
            model=model,
            options=options,
            messages=messages if messages is not None else (),
            chat=chat,
            n=fields.integer("n", 1, low=1, high=MOST_CHOICES),
            stream=fields.flag("stream"),
            user=fields.user(),
            usage=usage,
            ignored=(*fields.ignored(quiet(self.table)), *skipped, *others),
        )

    def whole(self, asked: Asked, answers: Sequence[Answer], model: str) -> dict[str, Any]:
        """See ``Api``."""
        return {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion",
            "created": now(),
            "model": model,
            "choices": [_choice(index, answer, asked) for index, answer in enumerate(answers)],
            "usage": usage_of(answers),
        }

    def events(self, asked: Asked, model: str) -> ChatEvents:
        """See ``Api``."""
        return ChatEvents(asked, model)

    def error(self, failure: Failure, request_id: str) -> dict[str, Any]:
        """See ``Api``."""
        return error_body(failure, request_id)


class ChatEvents:
    """Chunks of a chat completion; see ``Events``."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._calls = [CallDeltas() for _ in range(asked.choices)]
        self._id = new_id("chatcmpl-")
        self._base = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": now(),
            "model": model,
            **({"usage": None} if asked.usage else {}),
        }

    def begin(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """The role of each answer."""
        first = {"role": "assistant", "content": ""}
        return b"".join(self._event(index, first) for index in range(self._asked.choices))

    def chunk(self, index: int, chunk: GenerationChunk) -> bytes:
        """Its addition: text, reasoning or a part of a call."""
        delta: dict[str, Any] = {}
        if chunk.tool_call is not None:
            given, text = self._calls[index].add(chunk.tool_call, chunk.text)
            if given is not None:
                first = {} if given.id is None else {"id": given.id, "type": "function"}
                name = {} if given.name is None else {"name": given.name}
                function = {**name, "arguments": given.arguments}
                delta["tool_calls"] = [{"index": given.index, **first, "function": function}]
            elif text:
                delta["content"] = text
        elif chunk.text:
            delta["content" if chunk.segment == "content" else "reasoning_content"] = chunk.text
        logprobs = chunk.logprobs if chunk.segment == "content" else ()
        if not delta and not logprobs and chunk.finish_reason is None:
            return b""
        return self._event(
            index,
            delta,
            chunk.finish_reason,
            {"content": content_logprobs(logprobs), "refusal": None} if logprobs else None,
        )

    def pulse(self) -> bytes:
        """A chunk that adds nothing: some clients do not see comments."""
        return self._event(0, {})

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Token counts, if they were asked for."""
        counts = b""
        if self._asked.usage:
            counts = event({**self._base, "choices": [], "usage": usage_of(answers)})
        return counts + b"data: [DONE]\n\n"

    def fail(self, failure: Failure) -> bytes:
        """The error, which clients raise."""
        return event(error_body(failure, self._id))

    def _event(
        self, index: int, delta: object, reason: str | None = None, logprobs: object = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._base, "choices": [choice]})


def functions(tools: object) -> tuple[list[Any], list[str]]:
    """Tools that are functions, and a remark for each that is none: what it is runs elsewhere."""
    if tools is None:
        return [], []
    if not isinstance(tools, list):
        raise InvalidRequest("tools", f"must be a list, not {shown(tools)}")
    kinds = [
        tool.get("type", "function") if isinstance(tool, dict) else "function" for tool in tools
    ]
    known = [tool for tool, kind in zip(tools, kinds, strict=True) if kind == "function"]
    skipped = [f"tools of type {shown(kind)}" for kind in kinds if kind != "function"]
    return known, list(dict.fromkeys(skipped))


def _thinking(fields: Fields) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` for the model's switch, as several servers have it."""
    switch = fields.options(("enable_thinking",)).get("enable_thinking")
    given = fields.take("thinking", switch)
    if isinstance(given, dict):
        return switched(given)
    return {} if given is None else {"thinking": given}


def _choice_of(tools: list[Any], choice: Any) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` for tools and which of them may or must be called.

    Raises:
        InvalidRequest: one must be called, but none is there.
    """
    if choice is None or choice == "any":
        choice = "auto" if choice is None else "required"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        allowed = allowed if isinstance(allowed, dict) else {}
        listed, _ = functions(allowed.get("tools"))
        names = [_name_of(tool) for tool in listed]
        tools = [tool for tool in tools if _name_of(tool) in names]
        choice = allowed.get("mode", "auto")
    if tools:
        return {"tools": tools, "tool_choice": choice}
    if choice not in ("auto", "none"):
        raise InvalidRequest("tool_choice", "a tool must be called, but none is given")
    return {}


def _name_of(tool: object) -> object:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def call_of(call: ToolCall) -> dict[str, Any]:
    """A call as clients take it."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def text_of(result: GenerationResult) -> str:
    """The text of an answer, with what the model wrote where a call came out wrong."""
    return result.text + "".join(call.raw for call in result.tool_calls if not call.ok)


def _choice(index: int, answer: Answer, asked: Asked) -> dict[str, Any]:
    result = answer.result
    calls = [call_of(call) for call in result.tool_calls if call.ok]
    message: dict[str, Any] = {"role": "assistant", "content": text_of(result), "refusal": None}
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    logprobs = None
    if "logprobs" in asked.options:
        logprobs = {"content": content_logprobs(answer.logprobs), "refusal": None}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": result.finish_reason,
    }
