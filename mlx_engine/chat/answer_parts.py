"""The parts of an answer, as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.calls import Calls
from mlx_engine.chat.quoting import Quoting
from mlx_engine.chat.source import Source
from mlx_engine.core.stream import Piece


class AnswerParts:
    """The text of an answer, and the pieces it was taken apart into.

    Args:
        tools: the schemas of the arguments, by the tools' names.
        parallel: whether more than one call may be made.
        literal: the first of each marker counts, since a grammar binds the answer.
    """

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        *,
        parallel: bool = True,
        literal: bool = False,
    ) -> None:
        self.source = Source()
        self.pieces: list[Piece] = []
        self.calls = Calls(self.source, tools, self.pieces, parallel=parallel, literal=literal)
        self.quoting = Quoting()
        self.in_reasoning = False
        self.reasoning_over = False  # no more of it can come
        self.is_reading = True  # calls, of which more may come

    @property
    def has_tools(self) -> bool:
        """Whether there is anything to call."""
        return bool(self.calls.tools)

    def content(self, text: str) -> None:
        """Give out content."""
        if text:
            self.quoting.feed(text)
            self.pieces.append(Piece("content", text))

    def reasoning(self, text: str) -> None:
        """Give out reasoning."""
        if text:
            self.pieces.append(Piece("reasoning", text))
