"""JSON as models write it: read while it comes, passed on as JSON that every client can read."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from mlx_engine.chat.source import CutOff, Emit, Malformed, Source, Steps

# Values are nested no deeper: others parse them with the stack that they have.
DEEPEST = 100

_CHARACTERS = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_BETWEEN = re.compile(r"[\s,:]+")
_SCALAR = re.compile(r"[-+.0-9a-zA-Z]+")
_ESCAPE = re.compile(r'["\\/bfnrt]')
_HEX = re.compile(r"[0-9a-fA-F]*")
_CLOSES = {"{": "}", "[": "]"}


def quoted(text: str) -> str:
    """A text as a JSON string, with its characters as they are; halves of one become U+FFFD."""
    return json.dumps(_whole(text), ensure_ascii=False)


def escaped(text: str) -> str:
    """A part of a JSON string."""
    return quoted(text)[1:-1]


def _whole(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse(text: str) -> Any:
    """The value of a JSON text that is not nested deeper than ``DEEPEST``.

    Raises:
        Malformed: it is none, or has a number that JSON has not.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the arguments are no JSON: {error}"[:200]) from None


def normalized(text: str) -> str:
    """A whole JSON text as ``json_value`` gives it.

    Raises:
        Malformed: it is none.
    """
    source, parts = Source(), list[str]()
    source.add(text)
    source.ended = True
    for _ in json_value(source, parts.append):
        pass
    if source.text[source.at :].strip():
        raise Malformed("text follows the arguments")
    parse(found := "".join(parts))
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is none of its numbers")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def json_value(source: Source, emit: Emit) -> Steps[None]:
    """Read one value and emit its text.

    Raises:
        Malformed: it is none. Not everything is seen here; ``parse`` tells about the rest.
    """
    closes: list[str] = []
    yield from source.skip_space()
    while True:
        char = yield from source.peek()
        if char == '"':
            yield from json_string(source, emit)
        elif char in ("{", "["):
            closes.append(_CLOSES[char])
            if len(closes) > DEEPEST:
                raise Malformed(f"the arguments are nested deeper than {DEEPEST} levels")
            emit(char)
            source.at += 1
        elif closes and char == closes[-1]:
            closes.pop()
            emit(char)
            source.at += 1
        elif closes and (found := _BETWEEN.match(source.text, source.at)):
            emit(found.group())
            source.at = found.end()
        elif _SCALAR.match(source.text, source.at):
            yield from _scalar(source, emit)
        else:
            source.fail("JSON")
        if not closes:
            return


def _scalar(source: Source, emit: Emit) -> Steps[None]:
    while found := _SCALAR.match(source.text, source.at):
        emit(found.group())
        source.at = found.end()
        if source.at < len(source.text) or source.ended:
            return
        yield


def json_string(source: Source, emit: Emit) -> Steps[None]:
    """Read a string and emit it; control characters in it, which JSON has not, are escaped."""
    source.at += 1
    emit('"')
    while True:
        if found := _CHARACTERS.match(source.text, source.at):
            emit(found.group())
            source.at = found.end()
        char = yield from source.peek()
        if char == "":
            raise CutOff
        if char == "\\":
            yield from _escape(source, emit)
            continue
        if char == '"':
            source.at += 1
            emit('"')
            return
        if char < " " or "\ud800" <= char <= "\udfff":
            source.at += 1
            emit(escaped(char))


def _escape(source: Source, emit: Emit) -> Steps[None]:
    yield from _have(source, 2)
    if _ESCAPE.match(source.text, source.at + 1):
        emit(source.text[source.at : source.at + 2])
        source.at += 2
        return
    code = yield from _code(source, 0)
    if not 0xD800 <= code <= 0xDFFF:
        emit(source.text[source.at : source.at + 6])
    elif code <= 0xDBFF and (yield from _low_half_follows(source)):
        emit(source.text[source.at : source.at + 12])
        source.at += 6
    else:
        emit("\ufffd")
    source.at += 6


def _low_half_follows(source: Source) -> Steps[bool]:
    for length, char in ((7, "\\"), (8, "u")):
        if not (yield from _have(source, length, False)):
            return False
        if source.text[source.at + length - 1] != char:
            return False
    return 0xDC00 <= (yield from _code(source, 6)) <= 0xDFFF


def _code(source: Source, start: int) -> Steps[int]:
    """The code of an escape of four digits that begins so far from here."""
    yield from _have(source, start + 6)
    digits = source.text[source.at + start + 2 : source.at + start + 6]
    found = _HEX.match(digits)
    if source.text[source.at + start + 1] != "u" or found is None or found.end() != 4:
        wrong = source.text[source.at + start : source.at + start + 6]
        raise Malformed(f"{wrong!r} is no escape of JSON")
    return int(digits, 16)


def _have(source: Source, count: int, must: bool = True) -> Steps[bool]:
    """Wait for so many characters from here."""
    while len(source.text) - source.at < count:
        if source.ended:
            if must:
                raise CutOff
            return False
        yield
    return True


class TextSource:
    """JSON within a JSON string, read as the string is: pieces of it go in, the value comes out.

    Args:
        emit: gets the value's text; and from where it is none, whatever there is.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._source = Source()
        self._steps = json_value(self._source, emit)
        self._is_read = False  # to the end of the value, or to where it is none

    def add(self, piece: str) -> None:
        """Take what ``json_string`` emits."""
        if piece != '"':  # at its ends
            self._source.add(parse(f'"{piece}"'))
            self._go_on()

    def end(self) -> None:
        """Take no more."""
        self._source.ended = True
        self._go_on()

    def _go_on(self) -> None:
        source = self._source
        if not self._is_read:
            try:
                next(self._steps)
            except (StopIteration, Malformed):
                self._is_read = True
        if self._is_read and (rest := source.text[source.at :]).strip():
            source.at = len(source.text)
            self._emit(rest)
