"""Tokens -> text. Nothing else turns one into the other.

    token ─► detokenizer ─► stop strings ─► segments ─► pieces of (segment, text)

Each stage holds back what may still become something else: half a character, the beginning
of a stop string, the beginning of a marker such as ``<think>``. All matching is done on
text, since the same text can be tokenized in many ways.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper

from mlx_engine.outputs import Segment, ToolCall

Piece = tuple[Segment, str]

_SEGMENTS: dict[str | None, Segment] = {
    "normal": "content",
    "reasoning": "reasoning",
    "tool": "tool_call",
}
_RAW = "raw"


class TextAssembler:
    """Builds the text of one answer from its tokens.

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
        self._size = len(tokenizer)
        self._detokenizer: Any = tokenizer.detokenizer
        if type(self._detokenizer) is NaiveStreamingDetokenizer:
            self._detokenizer = WindowDetokenizer(tokenizer)
        self._tools = tools
        self._held: list[int] = []
        self._stops: Any = None
        if stop:
            # A state of None ends the matching: the stop string and all after it is dropped.
            machine = TextStateMachine({_RAW: [(string, None) for string in stop]})
            self._stops = machine.make_state(_RAW)
        self._segments: Any = None
        if initial_state is not None:
            self._segments = make_text_state_machine(tokenizer).make_state(initial_state)
        self._parts: dict[Segment, list[str]] = {"content": [], "reasoning": [], "tool_call": []}
        self._calls: list[ToolCall] = []
        self._call: list[str] | None = None
        self.stopped = False

    @property
    def content(self) -> str:
        """All content so far."""
        return "".join(self._parts["content"])

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._parts["reasoning"])

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls, parsed; complete after ``finish``."""
        return tuple(self._calls)

    def add(self, token: int) -> list[Piece]:
        """The text that this token completes. ``stopped`` tells if a stop string did."""
        if token >= self._size:
            return []  # the model's matrix is padded: the tokenizer has no such token
        self._detokenizer.add_token(token)
        text: str = self._detokenizer.last_segment
        if not text:
            self._held.append(token)
            return []
        self._held.clear()
        return self._match(text)

    def finish(self) -> list[Piece]:
        """Everything that is still held back, since no more tokens will come."""
        pieces: list[Piece] = []
        if not self.stopped:
            pieces += self._match(self._last_text())
        if self._stops is not None and not self.stopped:
            self._stops, held, _ = TextStateMachine.flush(self._stops)
            pieces += self._split(held)
        if self._segments is not None:
            self._segments, held, state = TextStateMachine.flush(self._segments)
            pieces += self._keep([(state, held)])
        self._end_call()
        return pieces

    def _last_text(self) -> str:
        try:
            self._detokenizer.finalize()
        except KeyError:
            # mlx_lm 0.32.2: the byte-level detokenizer fails at its end when it holds half
            # a character followed by an added token whose own text is not ASCII.
            return str(self._tokenizer.decode(self._held))
        return str(self._detokenizer.last_segment)

    def _match(self, text: str) -> list[Piece]:
        if self._stops is None:
            return self._split(text)
        self._stops, segments = TextStateMachine.split(self._stops, text)
        if segments[-1][0] is None:
            self.stopped = True
        return self._split("".join(part for state, part in segments if state is not None))

    def _split(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._segments is None:
            self._parts["content"].append(text)
            return [("content", text)]
        self._segments, segments = TextStateMachine.split(self._segments, text)
        return self._keep(segments)

    def _keep(self, segments: list[tuple[str | None, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for state, text in segments:
            segment = _SEGMENTS.get(state)  # other states hold headers, which are no text
            if segment == "tool_call":
                self._call = self._call if self._call is not None else []
                self._call.append(text)
            else:
                self._end_call()
            if segment is not None and text:
                self._parts[segment].append(text)
                pieces.append((segment, text))
        return pieces

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._calls += parse_tool_calls(self._tokenizer, "".join(call), self._tools)


class WindowDetokenizer:
    """For tokenizers of which mlx_lm knows only ``decode``; stands in for its own.

    A token's text is what decoding the last few tokens with it gives beyond decoding them
    without it, so that spaces and merges come out as in the whole text. mlx_lm 0.32.2 decodes
    line by line instead: it shows characters twice that come in several tokens, and loses a
    space at the beginning of each line.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = []
        self._begin = 0  # of the window
        self._shown = 0  # tokens whose text has been given out
        self._text = ""

    @property
    def last_segment(self) -> str:
        """The text since the last time it was asked for."""
        text, self._text = self._text, ""
        return text

    def add_token(self, token: int) -> None:
        """Take one more token; its text is held back while a character is incomplete."""
        self._tokens.append(token)
        before, after = self._window()
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self._text += after[len(before) :]
            self._begin, self._shown = self._shown, len(self._tokens)

    def finalize(self) -> None:
        """Let out what is held back."""
        before, after = self._window()
        self._text += after[len(before) :]
        self._begin = self._shown = len(self._tokens)

    def _window(self) -> tuple[str, str]:
        window = self._tokens[self._begin :]
        return self._decode(window[: self._shown - self._begin]), self._decode(window)


def parse_tool_calls(
    tokenizer: TokenizerWrapper, raw: str, tools: Sequence[Any] | None
) -> list[ToolCall]:
    """The calls in the text between two markers; a malformed one is reported, not lost."""
    try:
        parsed = tokenizer.tool_parser(raw, tools)
    except Exception as error:  # noqa: BLE001 - the border: parsers raise anything
        return [ToolCall(None, None, raw, error=f"{type(error).__name__}: {error}")]
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
                    return ToolCall(None, None, raw, error="it is nested too deep")
            return ToolCall(name, arguments, raw, id=given if isinstance(given, str) else None)
    return ToolCall(None, None, raw, error="the text is not a call with a name and arguments")


# Half of a character beyond the first 65,536, as JSON spells those; alone it is in no text.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _valid(value: Any) -> Any:
    """A value whose strings are text, so that the next turn's prompt may have them in it."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_valid(key): _valid(item) for key, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, list) else value
