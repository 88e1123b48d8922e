"""Tokens -> text. Nothing else turns one into the other.

    token ─► detokenizer ─► stop strings ─► segments ─► pieces of (segment, text)

Each stage holds back what may still become something else, and nothing more: half a character,
the beginning of a stop string, the beginning of a marker such as ``<think>``. All matching is
done on text, since the same text can be tokenized in many ways.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.generate import make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.core.stream import Piece
from mlx_engine.generation.string_search import StringSearch, StringSet
from mlx_engine.models.detokenizer import make_detokenizer
from mlx_engine.outputs import Segment, ToolCall, ToolCallDelta

_SEGMENTS: dict[str | None, Segment] = {
    "normal": "content",
    "reasoning": "reasoning",
    "tool": "tool_call",
}


class TextAssembler:
    """The text of one answer, built from its tokens.

    Without segments and stop strings the content is what the tokenizer's ``decode`` gives for
    the tokens, to the letter, special tokens included. A stop string ends the answer at the
    first token with which the text contains one; the string that is complete first counts, of
    those that end at the same character the longest, and the content is what is before it.

    May be made on any thread.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer.
        initial_state: state of mlx_lm's text state machine in which a chat answer begins;
            ``None`` gives all text as content, markers included.
        tools: what the tool-call parser is told of the tools.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        stop: Sequence[str] = (),
        initial_state: str | None = None,
        tools: Sequence[Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = make_detokenizer(tokenizer)
        self._tools = tools
        self._stops = StringSearch(StringSet(stop)) if stop else None
        self._ahead: _Ahead | None = None
        self._segments: _Segments | None = None
        if initial_state is not None:
            self._segments = _Segments(tokenizer, initial_state)
        self._parts: dict[Segment, list[str]] = {"content": [], "reasoning": [], "tool_call": []}
        self._calls: list[ToolCall] = []
        self._call: list[str] | None = None
        self.stopped = False

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
        return tuple(self._calls)

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
        if self._segments is not None:
            pieces += self._keep(self._segments.finish())
        return pieces + self._end_call()

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
            text, found, _ = self._stops.feed(text)
            self.stopped = found is not None
        return self._split(text)

    def _split(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._segments is None:
            self._parts["content"].append(text)
            return [Piece("content", text)]
        return self._keep(self._segments.feed(text))

    def _keep(self, segments: list[tuple[str | None, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for state, text in segments:
            segment = _SEGMENTS.get(state)  # other states hold headers, which are no text
            if segment == "tool_call":
                self._call = self._call if self._call is not None else []
                self._call.append(text)
            else:
                pieces += self._end_call()
            if segment is not None and text:
                self._parts[segment].append(text)
                pieces.append(Piece(segment, text))
        return pieces

    def _end_call(self) -> list[Piece]:
        call, self._call = self._call, None
        if call is None:
            return []
        made = parse_tool_calls(self._tokenizer, "".join(call), self._tools)
        first = len(self._calls)
        self._calls += made
        return [
            Piece(
                "tool_call",
                "",
                ToolCallDelta(
                    number,
                    one.id,
                    one.name or None,
                    json.dumps(one.arguments) if one.ok else "",
                    one.error,
                ),
            )
            for number, one in enumerate(made, first)
        ]


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


class _Segments:
    """The parts of a chat answer, between the markers that mlx_lm's state machine knows.

    mlx_lm 0.32.2 gives text out only where no marker at all may have begun, so that ``<<<<``
    would be held for ever.
    """

    def __init__(self, tokenizer: TokenizerWrapper, state: str | None) -> None:
        self._markers: dict[str | None, dict[str, str | None]] = {
            name: {"".join(marker): targets[index] for marker, index in set(_matches(trie))}
            for name, (trie, targets) in make_text_state_machine(tokenizer)._states.items()
        }
        self._searches: dict[str | None, StringSet] = {}
        self._enter(state)

    def _enter(self, state: str | None) -> None:
        if state not in self._searches:
            self._searches[state] = StringSet(self._markers.get(state, ()))
        self._state, self._search = state, StringSearch(self._searches[state])

    def feed(self, text: str) -> list[tuple[str | None, str]]:
        """The text of each state that it passes through; the last is the present one."""
        segments: list[tuple[str | None, str]] = []
        while True:
            clear, marker, text = self._search.feed(text)
            segments.append((self._state, clear))
            if marker is None:
                return segments
            self._enter(self._markers[self._state][marker])

    def finish(self) -> list[tuple[str | None, str]]:
        """The text that was held back."""
        return [(self._state, self._search.finish())]


def _matches(trie: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """The strings of one of mlx_lm's tries, with their places in the list it was made of."""
    for key, value in trie.items():
        if key == "__match__":
            yield value
        elif key != "__fail__":
            yield from _matches(value)


def parse_tool_calls(
    tokenizer: TokenizerWrapper, raw: str, tools: Sequence[Any] | None
) -> list[ToolCall]:
    """The calls in the text between two markers; a malformed one is reported, not lost."""
    try:
        parsed = tokenizer.tool_parser(raw, tools)
    except Exception as error:  # noqa: BLE001 - the border: parsers raise anything
        return [_malformed(raw, f"{type(error).__name__}: {error}")]
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [_tool_call(call, raw) for call in calls] or [_tool_call(None, raw)]


def _tool_call(call: object, raw: str) -> ToolCall:
    if isinstance(call, dict):
        name, arguments, given = call.get("name"), call.get("arguments", {}), call.get("id")
        if isinstance(name, str) and isinstance(arguments, dict):
            if _HALF.search(raw):
                try:
                    name, arguments = _valid(name), _valid(arguments)
                except RecursionError:
                    return _malformed(raw, "it is nested too deep")
            return ToolCall(name, arguments, raw, id=given if isinstance(given, str) else _id())
    return _malformed(raw, "the text is not a call with a name and arguments")


def _malformed(raw: str, error: str) -> ToolCall:
    return ToolCall(raw=raw, error=error, id=_id())


def _id() -> str:
    return secrets.token_hex(5)[:9]


# Half of a character beyond the first 65,536, as JSON spells those; alone it is in no text.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _valid(value: Any) -> Any:
    """A value whose strings are text, so that the next turn's prompt may have them in it."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_valid(key): _valid(item) for key, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, list) else value
