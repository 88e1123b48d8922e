"""Events of Anthropic's API, and its values: token counts, stop reasons, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mlx_engine.outputs import FinishReason, GenerationChunk, GenerationResult, ToolCallDelta
from mlx_engine.server.answers import Answer
from mlx_engine.server.anthropic_input import signature
from mlx_engine.server.api import event
from mlx_engine.server.call_deltas import CallDeltas
from mlx_engine.server.failures import Failure, Kind
from mlx_engine.server.openai_values import new_id

Thoughts = Literal["shown", "omitted", "hidden"]  # omitted: their block is there without its text

_STOPS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "timeout": "max_tokens",
    "cancelled": "end_turn",
}
_TYPES: dict[Kind, str] = {
    "key": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "path": "not_found_error",
    "slow": "timeout_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
    "unavailable": "overloaded_error",
    "failed": "api_error",
}


class MessageEvents:
    """Events of a message; see ``Events``.

    Blocks of content come one after another, each with its number: thinking, text, calls.
    """

    def __init__(self, thoughts: Thoughts, model: str) -> None:
        self._thoughts = thoughts
        self._model = model
        self._id = new_id("msg_")
        self._calls = CallDeltas()
        self._open = ""  # the type of the block that has begun, and has not ended
        self._number = -1  # of the last block
        self._omitted: list[str] = []

    def begin(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """The message, without content."""
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, cached_tokens, 0),
        }
        return _event("message_start", message=message)

    def chunk(self, index: int, chunk: GenerationChunk) -> bytes:
        """Its addition to a block, which may begin with it."""
        if chunk.tool_call is not None:
            given, text = self._calls.add(chunk.tool_call, chunk.text)
            return self._text(text) if given is None else self._call(given)
        if not chunk.text:
            return b""
        return self._text(chunk.text) if chunk.segment == "content" else self._thought(chunk.text)

    def pulse(self) -> bytes:
        """A ping."""
        return _event("ping")

    def end(self, answers: Sequence[Answer]) -> bytes:
        """The end of the last block and of the message, with token counts."""
        # Clients look for a first block.
        last = self._begin({"type": "text", "text": ""}) if self._number < 0 else b""
        delta = stop_of(answers[0].result)
        counts = usage_of(answers[0])
        last += self._end() + _event("message_delta", delta=delta, usage=counts)
        return last + _event("message_stop")

    def fail(self, failure: Failure) -> bytes:
        """The error, which clients raise."""
        body = error_body(failure, self._id)
        if failure.kind == "busy":  # what clients take for that behind a status of 200
            body["error"]["type"] = "overloaded_error"
        return event(body, "error")

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        begun = b"" if self._open == "text" else self._begin({"type": "text", "text": ""})
        return begun + self._delta(type="text_delta", text=text)

    def _thought(self, text: str) -> bytes:
        if self._thoughts == "hidden":
            return b""
        begun = b""
        if self._open != "thinking":
            begun = self._begin({"type": "thinking", "thinking": "", "signature": ""})
        if self._thoughts == "omitted":
            self._omitted.append(text)
            return begun
        return begun + self._delta(type="thinking_delta", thinking=text)

    def _call(self, given: ToolCallDelta) -> bytes:
        begun = b""
        if given.id is not None:
            made = {"id": given.id, "name": given.name or "", "input": {}}
            begun = self._begin({"type": "tool_use", **made})
        if not given.arguments:
            return begun
        return begun + self._delta(type="input_json_delta", partial_json=given.arguments)

    def _begin(self, block: dict[str, Any]) -> bytes:
        ended = self._end()
        self._open = block["type"]
        self._number += 1
        return ended + _event("content_block_start", index=self._number, content_block=block)

    def _end(self) -> bytes:
        if not self._open:
            return b""
        signed = b""
        if self._open == "thinking":
            thought = "".join(self._omitted)
            self._omitted.clear()
            signed = self._delta(type="signature_delta", signature=signature(thought))
        self._open = ""
        return signed + _event("content_block_stop", index=self._number)

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._number, delta=delta)


def stop_of(result: GenerationResult) -> dict[str, Any]:
    """Why an answer has ended, and the stop string that has ended it."""
    if result.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": result.stop_string}
    return {"stop_reason": _STOPS[result.finish_reason], "stop_sequence": None}


def usage_of(answer: Answer) -> dict[str, Any]:
    """Token counts of an answer."""
    usage = answer.result.usage
    counts = _usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    return {**counts, "output_tokens_details": {"thinking_tokens": answer.reasoning_tokens}}


def error_body(failure: Failure, request_id: str) -> dict[str, Any]:
    """The body of an error."""
    message = failure.message
    if (most := failure.context_length) is not None:  # agents shorten their context by these words
        tokens = failure.prompt_tokens or most + 1
        most = min(most, tokens - 1)  # a prompt that leaves no room for an answer is too long
        message = f"prompt is too long: {tokens} tokens > {most} maximum ({message})"
    kind = _TYPES.get(failure.kind, "invalid_request_error")
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def _usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Token counts as this API splits them: what was cached is no part of ``input_tokens``.

    The prompt cache keeps prompts without being asked, so that nothing is counted as kept by the
    client's own wish.
    """
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def _event(name: str, **fields: object) -> bytes:
    return event({"type": name, **fields}, name)
