"""Tokens of an answer -> its text. Nothing else makes that of them.

    token ─► detokenizer ─► stop strings ─► parser of a chat's answer ─► pieces

Each stage holds back what may still become something else, and nothing more: half a character,
the beginning of a stop string, the beginning of a marker such as ``<think>``. All matching is
done on text, since the same text can be tokenized in many ways.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.chat.parser import AnswerParser
from mlx_engine.core.stream import Piece
from mlx_engine.generation.string_search import StringSearch, StringSet
from mlx_engine.models.detokenizer import make_detokenizer
from mlx_engine.outputs import Segment, ToolCall


class TextAssembler:
    """The text of one answer, built from its tokens.

    Without a parser and stop strings the content is what the tokenizer's ``decode`` gives for
    the tokens, to the letter, special tokens included. A stop string ends the answer at the
    first token with which the text contains one; the string that is complete first counts, of
    those that end at the same character the longest, and the content is what is before it.

    May be made on any thread.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer.
        parser: of a chat's answer; ``None`` gives all text as content, markers included.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        stop: Sequence[str] = (),
        parser: AnswerParser | None = None,
    ) -> None:
        self._detokenizer = make_detokenizer(tokenizer)
        self._stops = StringSearch(StringSet(stop)) if stop else None
        self._ahead: _Ahead | None = None
        self._parser = parser
        self._parts: dict[Segment, list[str]] = {"content": [], "reasoning": [], "tool_call": []}
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer: ``stop_string``."""
        return self.stop_string is not None

    @property
    def content(self) -> str:
        """Content so far."""
        return "".join(self._parts["content"])

    @property
    def reasoning(self) -> str:
        """Reasoning so far."""
        return "".join(self._parts["reasoning"])

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls, parsed; complete after ``finish``."""
        return () if self._parser is None else self._parser.calls

    def add(self, token: int) -> list[Piece]:
        """The text that this token completes. ``stopped`` tells if a stop string did."""
        text = self._detokenizer.add(token)
        pieces = self._match(text) if text else []
        if self._stops is not None and not self.stopped and self._ends_here(self._stops):
            pieces += self._match(self._detokenizer.finish())
        return pieces

    def finish(self) -> list[Piece]:
        """The pieces that are still held back, since no more tokens will come."""
        pieces: list[Piece] = []
        if not self.stopped:
            pieces += self._match(self._detokenizer.finish())
        if self._stops is not None and not self.stopped:
            pieces += self._split(self._stops.finish())
        if self._parser is not None:
            pieces += self._keep(self._parser.finish())
        return pieces

    def _ends_here(self, stops: StringSearch) -> bool:
        """Whether what the detokenizer holds has a stop string in it, if no token follows."""
        held = self._detokenizer.ahead
        if not held:
            return False
        if self._ahead is None or self._ahead.held is not held:
            self._ahead = _Ahead(held, copy.copy(stops))
        if not self._ahead.found():
            return False
        return copy.copy(stops).feed(self._detokenizer.preview())[1] is not None

    def _match(self, text: str) -> list[Piece]:
        if self._stops is not None:
            text, self.stop_string, _ = self._stops.feed(text)
        return self._split(text)

    def _split(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._parser is None:
            return self._keep([Piece("content", text)])
        return self._keep(self._parser.feed(text))

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            self._parts[piece.segment].append(piece.text)
        return pieces


class _Ahead:
    """A search for stop strings in text that the detokenizer holds; each part once."""

    def __init__(self, held: list[str], search: StringSearch) -> None:
        self.held = held
        self._search = search
        self._seen = 0

    def found(self) -> bool:
        """Whether a part that was not seen yet completes one."""
        text = "".join(self.held[self._seen :])
        self._seen = len(self.held)
        return self._search.feed(text)[1] is not None
