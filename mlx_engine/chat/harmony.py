"""Answers that are a row of messages, each with a header that tells its channel: gpt-oss."""

from __future__ import annotations

from functools import lru_cache

import regex

from mlx_engine.chat.answer_format import AnswerFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.json_text import json_value
from mlx_engine.chat.quoting import Quoting
from mlx_engine.chat.source import Emit, Malformed, Match, Pattern, Steps

_ROLE = r"<\|start\|>assistant\s{0,4}"
_TO = r"to=(?P<to>[\w.\-]{1,256})\s{0,4}"
_KIND = r"(?:(?:<\|constrain\|>\s{0,4})?[\w\-/]{1,32}\s{0,4})?"
_CHANNEL = r"<\|channel\|>(?P<channel>analysis|commentary|final)\s{0,4}"
_BODY = r"<\|message\|>"
_TEXT = rf"(?P<text>(?:{_ROLE})?{_CHANNEL}{_KIND}{_BODY}|{_ROLE}{_BODY})"
_CALL = rf"(?P<call>(?:{_ROLE})?(?:\s{{0,4}}{_TO}{_CHANNEL}{_KIND}|{_CHANNEL}{_TO}{_KIND}){_BODY})"
_END = r"<\|(?:end|return|call)\|>"
_START = "<|start|>assistant"


@lru_cache(maxsize=4)
def header(calls: bool, ended: bool) -> Pattern:
    """Markers that end a message's text: its end, unless in backticks, or another's header."""
    behind = "(?!`)" if ended else "(?=[^`])"
    every = [rf"(?P<end>(?<!`){_END}|{_END}{behind})", _TEXT, *([_CALL] if calls else [])]
    return regex.compile("|".join(every))


_BEHIND_CALL: Pattern = regex.compile(_END)
_NO_CALL: Pattern = regex.compile(rf"{_END}|<\|start\|>|<\|channel\|>")


def read(parts: AnswerParts, form: AnswerFormat, prefix: str) -> Steps[None]:
    """Read a whole answer."""
    source = parts.source
    give = _begun(parts, prefix)
    while True:
        found = yield from source.find(
            header(parts.has_tools, False), give, header(parts.has_tools, True)
        )
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
        elif found["text"] is not None:
            give = _segment(parts, found["channel"] or "final")
        else:
            yield from _call(parts, found)
            give = _segment(parts, "final")


def _begun(parts: AnswerParts, prefix: str) -> Emit:
    """The taker of the text of the message that the prompt ends with."""
    begun = prefix[prefix.rfind(_START) :] if _START in prefix else ""
    found = header(calls=False, ended=True).match(begun)
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
    calls.begin(found["to"].removeprefix("functions."))
    error = None
    try:
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
