"""The events of a streamed answer of ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlx_engine.outputs import GenerationChunk, TokenLogprob, ToolCallDelta
from mlx_engine.server.answers import Answer
from mlx_engine.server.api import event
from mlx_engine.server.call_deltas import CallDeltas
from mlx_engine.server.failures import Failure
from mlx_engine.server.openai_values import error_body
from mlx_engine.server.response_output import Event, HeldCall, OutputItem
from mlx_engine.server.response_tools import Tools

Response = Callable[..., dict[str, Any]]  # by status, output and what else there is to say


class ResponseEvents:
    """Events of a response; see ``Events``. An item is done before the next one begins.

    Args:
        response: makes the response as it is told.
        tools: of the request.
        sealed: whether reasoning is to have its text in a form that comes back.
        keep: takes the items when all is done.
    """

    def __init__(
        self,
        response: Response,
        tools: Tools,
        sealed: bool,
        keep: Callable[[Sequence[dict[str, Any]]], None],
    ) -> None:
        self._response = response
        self._tools = tools
        self._sealed = sealed
        self._keep = keep
        self._number = 0  # of the next event
        self._calls = CallDeltas()
        self._item: OutputItem | HeldCall | None = None  # the open one
        self._segment: object = None  # which it is of
        self._output: list[dict[str, Any]] = []  # those that are done

    def begin(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """That it is there; nothing may come before that."""
        return self._told("created", self._response("in_progress", [])) + self.pulse()

    def pulse(self) -> bytes:
        """An event that was there already: to clients that wait, any is a sign of life."""
        return self._told("in_progress", self._response("in_progress", []))

    def chunk(self, index: int, chunk: GenerationChunk) -> bytes:
        """Its addition: text, reasoning or a part of a call."""
        if chunk.tool_call is not None:
            return self._call(chunk.tool_call, chunk.text)
        if chunk.text or (chunk.logprobs and chunk.segment == "content"):
            return self._say(chunk.segment, chunk.text, chunk.logprobs)
        return b""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """The rest of the last item, and all of the response."""
        status = "incomplete" if answers[0].result.finish_reason == "length" else "completed"
        data = self._finish(status)
        if all(item["type"] == "reasoning" for item in self._output):  # clients look for an answer
            data += self._say("content", "") + self._finish(status)
        self._keep(self._output)
        return data + self._told(status, self._response(status, self._output, answers=answers))

    def fail(self, failure: Failure) -> bytes:
        """The error."""
        data = self._finish("incomplete")
        told = error_body(failure, "")["error"]
        error = {"code": told["code"] or "server_error", "message": told["message"]}
        return data + self._told("failed", self._response("failed", self._output, error=error))

    def _say(self, segment: str, text: str, logprobs: Iterable[TokenLogprob] = ()) -> bytes:
        kind = "reasoning" if segment == "reasoning" else "message"
        data = b""
        if self._item is None or self._segment != segment:
            data = self._turn(segment, OutputItem(kind, sealed=self._sealed))
        assert self._item is not None
        logprobs = logprobs if kind == "message" else ()
        return data + self._events(self._item.go_on(text, logprobs) if text or logprobs else ())

    def _call(self, delta: ToolCallDelta, text: str) -> bytes:
        given, said = self._calls.add(delta, text)
        if given is None and said:
            return self._say("content", said)
        data = b""
        if given is not None and given.id is not None:
            data = self._turn(given.index, self._new_call(given.id, given.name or ""))
        if isinstance(self._item, HeldCall):
            self._item.raw.append(text)
        if given is None or self._item is None:
            return data
        self._item.wrong = given.error is not None
        return data + self._events(self._item.go_on(given.arguments) if given.arguments else ())

    def _new_call(self, call_id: str, name: str) -> OutputItem | HeldCall:
        named = self._tools.named(name)
        return HeldCall(call_id, named) if named.custom else OutputItem.call(call_id, named)

    def _turn(self, segment: object, item: OutputItem | HeldCall) -> bytes:
        """From the open item to the next one."""
        data = self._finish("completed")
        self._item, self._segment = item, segment
        return data + self._events(item.begin())

    def _finish(self, status: str) -> bytes:
        if self._item is None:
            return b""
        data = self._events(self._item.finish(status))
        self._output.append(self._item.item(status))
        self._item = None
        return data

    def _events(self, events: Iterable[Event]) -> bytes:
        place = {"output_index": len(self._output)}
        return b"".join([self._event(name, {**place, **fields}) for name, fields in events])

    def _told(self, name: str, response: dict[str, Any]) -> bytes:
        return self._event(name, {"response": response})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        kind = f"response.{name}"
        told = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event(told, kind)
