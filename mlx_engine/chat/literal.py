"""Values as Python and Gemma write them, read while they come and passed on as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import regex

from mlx_engine.chat.json_text import DEEPEST, escaped, parse, quoted
from mlx_engine.chat.source import CutOff, Emit, Malformed, Pattern, Source, Steps


@dataclass(frozen=True, slots=True)
class Dialect:
    """How values are written.

    Attributes:
        quotes: what a string begins and ends with.
        escapes: a backslash in a string has a meaning.
        bare_keys: the keys of objects are written without quotes.
    """

    quotes: tuple[str, ...]
    escapes: bool
    bare_keys: bool


PYTHON = Dialect(('"""', "'''", '"', "'"), escapes=True, bare_keys=False)
GEMMA = Dialect(('<|"|>',), escapes=False, bare_keys=True)
FUNCTION_GEMMA = Dialect(("<escape>",), escapes=False, bare_keys=True)

_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false",
          "null": "null"}  # fmt: skip
_WORD = re.compile(r"[-+.\w]+")
_LONGEST_WORD = 4096
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_KEY = regex.compile(r"(?P<key>[^\s:{}\[\],]{1,256})\s{0,16}:")
_SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0",
           "\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}  # fmt: skip
_CODE = regex.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")
_OTHER = regex.compile(r"\\.", regex.DOTALL)
_LOW = regex.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")


def python_value(text: str) -> str:
    """The JSON text of one whole Python value.

    Raises:
        Malformed: it is none.
    """
    source, parts = Source(), list[str]()
    source.add(text)
    source.ended = True
    for _ in literal(source, parts.append, PYTHON):
        pass
    if source.text[source.at :].strip():
        raise Malformed("text follows the value")
    parse(found := "".join(parts))
    return found


def literal(source: Source, emit: Emit, dialect: Dialect, depth: int = 0) -> Steps[None]:
    """Read one value and emit its JSON text.

    Raises:
        Malformed: it is none.
    """
    char = yield from source.skip_space()
    if depth >= DEEPEST // 2:
        raise Malformed(f"the arguments are nested deeper than {DEEPEST // 2} levels")
    if char == "{":
        yield from _items(source, emit, dialect, depth, "}")
    elif char == "[":
        yield from _items(source, emit, dialect, depth, "]")
    elif char == "(" and dialect is PYTHON:
        yield from _items(source, emit, dialect, depth, ")")
    elif not (yield from text_value(source, emit, dialect)):
        yield from _word(source, emit)


def _items(source: Source, emit: Emit, dialect: Dialect, depth: int, close: str) -> Steps[None]:
    """The items of a list or an object, up to its end."""
    source.at += 1
    emit("{" if close == "}" else "[")
    first = True
    while (char := (yield from source.skip_space())) != close:
        if not first:
            if char != ",":
                source.fail("',' or an end")
            source.at += 1
            if (yield from source.skip_space()) == close:  # a comma behind the last
                break
            emit(", ")
        first = False
        if close == "}":
            yield from _key(source, emit, dialect)
        yield from literal(source, emit, dialect, depth + 1)
    source.at += 1
    emit("}" if close == "}" else "]")


def _key(source: Source, emit: Emit, dialect: Dialect) -> Steps[None]:
    if (yield from text_value(source, emit, dialect)):
        if (yield from source.skip_space()) != ":":
            source.fail("':'")
        source.at += 1
    elif dialect.bare_keys:
        found = yield from source.expect(_KEY, "a key")
        emit(quoted(found["key"].strip('"')))
    else:
        source.fail("a key")
    emit(": ")


def _word(source: Source, emit: Emit) -> Steps[None]:
    """A number, or one of the words that stand for a value."""
    parts: list[str] = []
    while found := _WORD.match(source.text, source.at):
        parts.append(found.group())
        source.at = found.end()
        if source.at < len(source.text) or source.ended:
            break
        if sum(map(len, parts)) > _LONGEST_WORD:
            break
        yield
    word = "".join(parts)
    if not word:
        source.fail("a value")
    if word in _WORDS:
        emit(_WORDS[word])
    elif _NUMBER.fullmatch(word):
        emit(_json_number(word))
    else:
        raise Malformed(f"{word[:40]!r} is no value")


def _json_number(word: str) -> str:
    try:
        value = float(word) if set(word) & set(".eE") else int(word)
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise Malformed(f"{word[:40]!r} is no number of JSON") from None


def text_value(source: Source, emit: Emit, dialect: Dialect) -> Steps[bool]:
    """Read a string, if one is next, and emit it as it comes."""
    quotes = _quotes(dialect)
    if (found := (yield from source.look(quotes))) is None:
        return False
    quote = found.group()
    source.at = found.end()
    emit('"')
    stop = _stop(quote, dialect.escapes)

    def give(text: str) -> None:
        emit(escaped(text))

    while True:
        found = yield from source.find(stop, give)
        if found is None:
            raise CutOff
        if found.group() == quote:
            source.at = found.end()
            emit('"')
            return True
        yield from _escape(source, give)


def _escape(source: Source, give: Emit) -> Steps[None]:
    found = yield from source.look(_CODE)
    if found is None:
        found = yield from source.expect(_OTHER, "an escape")
        char = found.group()[1]
        give(_SIMPLE.get(char, "\\" + char))  # as Python has it: what means nothing stays
        return
    source.at = found.end()
    code = int(found[1] or found[2] or found[3], 16)
    if 0xD800 <= code <= 0xDBFF and (low := (yield from source.read(_LOW))):
        code = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
    give(chr(code) if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF else "\ufffd")


_patterns: dict[object, Pattern] = {}


def _quotes(dialect: Dialect) -> Pattern:
    if dialect not in _patterns:
        each = [regex.escape(quote) for quote in dialect.quotes]
        if dialect is PYTHON:
            # One more character or two tell an empty string from three quotes.
            each[2:] = [rf"{quote}(?={quote}?[^{quote}])" for quote in "\"'"]
        _patterns[dialect] = regex.compile("|".join(each))
    return _patterns[dialect]


def _stop(quote: str, escapes: bool) -> Pattern:
    if (quote, escapes) not in _patterns:
        text = regex.escape(quote) + (r"|\\" if escapes else "")
        _patterns[quote, escapes] = regex.compile(text)
    return _patterns[quote, escapes]
