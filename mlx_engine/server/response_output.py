"""Output items of ``/v1/responses``, whole and as events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_engine.outputs import TokenLogprob
from mlx_engine.server.openai_values import content_logprobs, new_id
from mlx_engine.server.response_input import seal
from mlx_engine.server.response_tools import Named, custom_input

Event = tuple[str, dict[str, Any]]  # name and fields


@dataclass(frozen=True, slots=True)
class _Form:
    """A kind of output item, as it is streamed.

    Attributes:
        id: what its ids begin with.
        text: of the events that tell its text.
        field: the name of the text in the last one of them.
        part: of the events that begin and end the part that the text is, where there is one.
        index: the name of the number of that part.
    """

    id: str
    text: str
    field: str = "text"
    part: str = ""
    index: str = ""


_FORMS = {
    "message": _Form("msg_", "output_text", part="content_part", index="content_index"),
    "reasoning": _Form(
        *("rs_", "reasoning_summary_text"), part="reasoning_summary_part", index="summary_index"
    ),
    "function_call": _Form("fc_", "function_call_arguments", "arguments"),
    "custom_tool_call": _Form("ctc_", "custom_tool_call_input", "input"),
}


class OutputItem:
    """An output item in the making.

    Args:
        kind: of item.
        sealed: whether reasoning has its text in a form that comes back.
        fields: others that it has.

    Attributes:
        wrong: whether it is a call that must not be made.
    """

    def __init__(self, kind: str, *, sealed: bool = False, **fields: Any) -> None:
        self.wrong = False
        self._kind = kind
        self._form = _FORMS[kind]
        self._fields = {"id": new_id(self._form.id), "type": kind, **fields}
        self._sealed = sealed
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @classmethod
    def call(cls, call_id: str, named: Named) -> OutputItem:
        """A call of a tool."""
        fields: dict[str, Any] = {"call_id": call_id, "name": named.name}
        if named.namespace is not None:
            fields["namespace"] = named.namespace
        return cls("custom_tool_call" if named.custom else "function_call", **fields)

    def add(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> list[dict[str, Any]]:
        """Add some text; the log-probabilities, as clients take them."""
        self._text.append(text)
        added = content_logprobs(logprobs)
        self._logprobs += added
        return added

    def item(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        status = "incomplete" if self.wrong else status
        begun = status != "in_progress"
        item, part = {**self._fields, "status": status}, self._part()
        if self._kind == "message":
            item.update(role="assistant", content=[part] if begun else [])
        elif self._kind == "reasoning":
            item.update(summary=[part] if begun else [])
            if self._sealed:
                item["encrypted_content"] = seal(part["text"])
        else:
            item[self._form.field] = "".join(self._text)
        return item

    def begin(self) -> Iterator[Event]:
        """The events with which it begins."""
        yield "output_item.added", {"item": self.item("in_progress")}
        if self._form.part:
            yield f"{self._form.part}.added", {**self._place(), "part": self._part()}

    def go_on(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> Iterator[Event]:
        """Events for more of its text."""
        added = self.add(text, logprobs)
        extra = {"logprobs": added} if self._kind == "message" else {}
        yield f"{self._form.text}.delta", {**self._place(), "delta": text, **extra}

    def finish(self, status: str) -> Iterator[Event]:
        """The events with which it ends."""
        told: dict[str, Any] = {self._form.field: "".join(self._text)}
        if self._kind == "message":
            told["logprobs"] = self._logprobs
        elif self._kind == "function_call":
            told["name"] = self._fields["name"]
        yield f"{self._form.text}.done", {**self._place(), **told}
        if self._form.part:
            yield f"{self._form.part}.done", {**self._place(), "part": self._part()}
        yield "output_item.done", {"item": self.item(status)}

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._fields["id"]}
        return {**place, self._form.index: 0} if self._form.index else place

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        if self._kind != "message":
            return {"type": "summary_text", "text": text}
        shown = {"type": "output_text", "text": text, "annotations": []}
        return {**shown, "logprobs": self._logprobs}


class HeldCall:
    """A call of a custom tool, told once it is complete: its input is in a piece of JSON.

    One that came out wrong is text, as the model wrote it.
    """

    def __init__(self, call_id: str, named: Named) -> None:
        self.wrong = False
        self.raw: list[str] = []
        self._call_id = call_id
        self._named = named
        self._arguments: list[str] = []
        self._made: OutputItem | None = None

    def begin(self) -> Iterator[Event]:
        """See ``OutputItem``."""
        yield from ()

    def go_on(self, text: str, logprobs: Iterable[TokenLogprob] = ()) -> Iterator[Event]:
        """See ``OutputItem``."""
        self._arguments.append(text)
        yield from ()

    def finish(self, status: str) -> Iterator[Event]:
        """See ``OutputItem``."""
        text = None if self.wrong else self._input()
        if text is None:
            self._made, text = OutputItem("message"), "".join(self.raw)
        else:
            self._made = OutputItem.call(self._call_id, self._named)
        yield from self._made.begin()
        yield from self._made.go_on(text)
        yield from self._made.finish(status)

    def item(self, status: str) -> dict[str, Any]:
        """See ``OutputItem``."""
        assert self._made is not None
        return self._made.item(status)

    def _input(self) -> str | None:
        try:
            arguments = json.loads("".join(self._arguments))
        except (ValueError, RecursionError):
            return None
        return custom_input(arguments) if isinstance(arguments, dict) else None
