"""The answers of a model, taken apart into content, reasoning and tool calls while they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mlx_engine.chat import bound_reader, harmony, response_template, tagged
from mlx_engine.chat.answer_format import AnswerFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.bound_answer import BoundAnswer
from mlx_engine.core.stream import Piece
from mlx_engine.outputs import ToolCall


class AnswerParser:
    """One answer, part by part.

    Held back is only what may still become a marker. However the text is cut, the pieces joined
    are the same. Nothing that a model writes raises: a call that is malformed has an error.

    Args:
        format: in which the model writes.
        tools: that the request has, as the chat template gets them; without any, there are no
            calls.
        prefix: what the template wrote behind the last message; it tells whether reasoning is open.
        parallel: whether more than one call may be made.
        bound: how an answer is written that a grammar binds; ``None`` if it is free.
    """

    def __init__(
        self,
        format: AnswerFormat,
        tools: Sequence[Mapping[str, Any]] | None,
        prefix: str = "",
        *,
        parallel: bool = True,
        bound: BoundAnswer | None = None,
    ) -> None:
        schemas = _schemas(tools or ())
        self._parts = AnswerParts(schemas, parallel=parallel, literal=bound is not None)
        if bound is not None:
            self._steps = bound_reader.read(self._parts, bound)
        else:
            self._steps = _READERS[format.structure](self._parts, format, prefix)
        next(self._steps, None)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete, those that came out wrong included."""
        return tuple(self._parts.calls.done)

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside reasoning."""
        return self._parts.in_reasoning

    @property
    def reasoning_over(self) -> bool:
        """Whether no reasoning can come any more, whatever the text."""
        return self._parts.reasoning_over

    def feed(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        source = self._parts.source
        if source.passes(text):
            return self._taken()
        if not text:
            return []
        source.add(text)
        return self._go_on()

    def finish(self) -> list[Piece]:
        """The pieces that are still held back, since no more text will come."""
        self._parts.source.ended = True
        return self._go_on()

    def _go_on(self) -> list[Piece]:
        next(self._steps, None)
        self._parts.calls.flush()
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces = self._parts.pieces
        if len(pieces) < 2:
            found = pieces.copy()
        else:
            found = []
            for key, each in groupby(pieces, key=lambda piece: (piece.segment, piece.call)):
                found.append(Piece(key[0], "".join(piece.text for piece in each), key[1]))
        pieces.clear()
        return found


_READERS = {
    "tagged": tagged.read,
    "harmony": harmony.read,
    "response_template": response_template.read,
}


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schemas of the tools' arguments by their names."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            schema = function.get("parameters")
            found[name] = schema if isinstance(schema, Mapping) else {}
    return found
