"""Answers that are a row of messages, each with a header that tells its channel: gpt-oss."""

from __future__ import annotations

from functools import lru_cache

import regex

from mlx_engine.chat.answer_format import AnswerFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.call_syntax import RUNS_CODE, code_argument
from mlx_engine.chat.json_text import json_value
from mlx_engine.chat.quoting import Quoting
from mlx_engine.chat.source import Emit, Malformed, Match, Pattern, Steps

_PART = (  # atomic: no part is read in more than one way
    r"(?>\s{0,4}to=(?P<to>[\w.\-]{1,256})|\s{0,4}<\|channel\|>(?P<channel>analysis|commentary|final)\b"
    r"|\s{0,4}<\|constrain\|>\s{0,4}[\w\-/]{1,32}|\s{1,4}[\w\-/]{1,32})"
)
_HEADER = (
    rf"(?P<header>(?:<\|start\|>assistant|(?=\s{{0,4}}(?:to=[\w.\-]{{1,256}}\s{{0,4}})?<\|channel\|>))"
    rf"(?:{_PART}){{0,8}}\s{{0,4}}<\|message\|>)"
)
_END = r"<\|(?:end|return|call)\|>"
_START = "<|start|>assistant"
_NO_TOOL = (None, "assistant", "user", "all")


@lru_cache(maxsize=2)
def header(ended: bool) -> Pattern:
    """Markers that end a message's text: its end, unless in backticks, or another's header."""
    behind = "(?!`)" if ended else "(?=[^`])"
    return regex.compile(rf"(?P<end>(?<!`){_END}|{_END}{behind})|{_HEADER}")


_BEHIND_CALL: Pattern = regex.compile(_END)
_NO_CALL: Pattern = regex.compile(rf"{_END}|<\|start\|>|<\|channel\|>")


def read(parts: AnswerParts, form: AnswerFormat, prefix: str) -> Steps[None]:
    """Read a whole answer."""
    source = parts.source
    give = _begun(parts, prefix)
    while True:
        found = yield from source.find(header(ended=False), give, header(ended=True))
        if found is None:
            return
        if not parts.in_reasoning and parts.quoting:
            give(source.text[source.at])
            source.at += 1
            continue
        source.at = found.end()
        parts.quoting = Quoting()
        if found["end"] is not None:
            give = _segment(parts, "final")
        elif parts.has_tools and found["to"] not in _NO_TOOL:
            yield from _call(parts, found)
            give = _segment(parts, "final")
        else:
            give = _segment(parts, found["channel"] or "final")


def _begun(parts: AnswerParts, prefix: str) -> Emit:
    """The taker of the text of the message that the prompt ends with."""
    begun = prefix[prefix.rfind(_START) :] if _START in prefix else ""
    found = header(ended=True).match(begun)
    if found is not None:
        return _segment(parts, found["channel"] or "final")
    if "<|channel|>" in begun and "<|message|>" not in begun:
        parts.source.add(begun)  # the model goes on with it
    return _segment(parts, "final")


def _segment(parts: AnswerParts, channel: str) -> Emit:
    parts.in_reasoning = channel == "analysis"
    return parts.reasoning if parts.in_reasoning else parts.content


def _call(parts: AnswerParts, found: Match) -> Steps[None]:
    """Read the message to a tool, whose header was read."""
    source, calls = parts.source, parts.calls
    parts.in_reasoning = False
    calls.open()
    name = found["to"].removeprefix("functions.")
    calls.begin(name)
    error = None
    try:
        if (yield from source.skip_space()) != "{" and name in RUNS_CODE:
            yield from code_argument(source, calls, _NO_CALL)
        else:
            yield from json_value(source, calls.add)
        calls.complete()
        char = yield from source.skip_space()
        if char and (yield from source.look(_NO_CALL)) is None:
            raise Malformed("text follows the arguments")
    except Malformed as malformed:
        error = str(malformed)
        source.rewind()
        yield from source.find(_NO_CALL, _nothing)
    calls.settle(error)
    yield from source.read(_BEHIND_CALL)


def _nothing(text: str) -> None:
    pass
