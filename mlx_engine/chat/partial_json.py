"""JSON that is still being written, as far as it can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mlx_engine.chat.json_text import DEEPEST

_SPACE = re.compile(r"[ \t\r\n]*")
_CHARACTERS = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_HIGH_HALF = re.compile(r"\\u[dD][89abAB]")  # of a character, whose other half follows
_LOW_HALF = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_ENDS = {"{": "}", "[": "]"}
_NOTHING = object()

Container = dict[str, Any] | list[Any]


class PartialJSON:
    """A JSON text in pieces, and the value of what is there of it; never an error.

    Strings, lists and objects are there as far as they were written; a number, a word and the
    name of a member once what follows shows that they are complete. Where the text is no JSON, or
    is nested deeper than ``DEEPEST``, reading has ended, and the value stays what it is.

    Each character is read once, when a value is asked for; a value then takes copies of the lists
    and objects that are still open, and of nothing else.
    """

    def __init__(self) -> None:
        self._new: list[str] = []
        self._text, self._at = "", 0
        self._open: list[tuple[Container, str]] = []  # with the name of the member that comes
        self._name = ""
        self._parts: list[str] = []  # of a string, or of what is none
        self._names = False  # whether that string is a name
        self._whole: Any = _NOTHING
        self._step: Callable[[], bool] = self._value
        self._last: Any = None

    def add(self, text: str) -> None:
        """Take the next piece of the text."""
        if text:
            self._new.append(text)

    @property
    def value(self) -> Any:
        """The value so far; ``None`` as long as nothing can be read."""
        if self._new:
            self._text = "".join((self._text[self._at :], *self._new))
            self._at = 0
            self._new.clear()
            while self._at < len(self._text) and self._step():
                pass
            if self._step != self._ended:
                self._last = self._so_far()
        return self._last

    def _so_far(self) -> Any:
        inner = self._whole
        if self._step == self._string and not self._names:
            inner = "".join(self._parts)
            self._parts = [inner]
        name = self._name
        for container, outer_name in reversed(self._open):
            inner = container.copy() if inner is _NOTHING else _with(container.copy(), name, inner)
            name = outer_name
        return None if inner is _NOTHING else inner

    # Each step reads on from here: whether it went on, and did not come to where more is needed.

    def _value(self) -> bool:
        if not (char := self._next_char()):
            return False
        if char == '"':
            self._at += 1
            self._parts, self._names, self._step = [], False, self._string
        elif char in _ENDS and len(self._open) < DEEPEST:
            self._at += 1
            self._open.append(({} if char == "{" else [], self._name))
            self._step = self._first
        elif _SCALAR.match(char):
            self._parts, self._step = [], self._scalar
        else:
            return self._break()
        return True

    def _first(self) -> bool:
        """The first member or item, or the end."""
        if not (char := self._next_char()):
            return False
        if char == self._closing:
            return self._close()
        self._step = self._value if self._in_list else self._member
        return True

    def _member(self) -> bool:
        if not (char := self._next_char()):
            return False
        if char != '"':
            return self._break()
        self._at += 1
        self._parts, self._names, self._step = [], True, self._string
        return True

    def _colon(self) -> bool:
        if not (char := self._next_char()):
            return False
        if char != ":":
            return self._break()
        self._at += 1
        self._step = self._value
        return True

    def _between(self) -> bool:
        """A comma or the end, behind a value."""
        if not (char := self._next_char()):
            return False
        if not self._open:
            return self._break()
        if char == self._closing:
            return self._close()
        if char != ",":
            return self._break()
        self._at += 1
        self._step = self._value if self._in_list else self._member
        return True

    def _string(self) -> bool:
        if found := _CHARACTERS.match(self._text, self._at):
            self._parts.append(found.group())
            self._at = found.end()
        if self._at == len(self._text):
            return False
        if self._text[self._at] == "\\":
            return self._escape()
        self._at += 1
        text = "".join(self._parts)
        if not self._names:
            return self._put(text)
        self._name, self._step = text, self._colon
        return True

    def _escape(self) -> bool:
        length = 6 if self._text.startswith("\\u", self._at) else 2
        if length == 6 and _HIGH_HALF.match(self._text, self._at):
            behind = self._text[self._at + 6 : self._at + 12]
            if len(behind) < 6 and (behind[:2] == "\\u"[: len(behind[:2])]):
                return False
            length = 12 if _LOW_HALF.fullmatch(behind) else 6
        if len(self._text) < self._at + length:
            return False
        try:
            self._parts.append(json.loads(f'"{self._text[self._at : self._at + length]}"'))
        except ValueError:
            return self._break()
        self._at += length
        return True

    def _scalar(self) -> bool:
        if found := _SCALAR.match(self._text, self._at):
            self._parts.append(found.group())
            self._at = found.end()
        if self._at == len(self._text):
            return False
        try:
            return self._put(json.loads("".join(self._parts)))
        except ValueError:
            return self._break()

    def _put(self, value: Any) -> bool:
        """A value is complete."""
        if self._open:
            _with(self._open[-1][0], self._name, value)
        else:
            self._whole = value
        self._step = self._between
        return True

    def _close(self) -> bool:
        self._at += 1
        container, self._name = self._open.pop()
        return self._put(container)

    def _break(self) -> bool:
        """The end of reading: it is no JSON, or none that is read."""
        self._last, self._step = self._so_far(), self._ended
        return True

    def _ended(self) -> bool:
        self._at = len(self._text)
        return False

    def _next_char(self) -> str:
        """The next character that is no space; nothing if it is not there yet."""
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()
        return self._text[self._at : self._at + 1]

    @property
    def _in_list(self) -> bool:
        return isinstance(self._open[-1][0], list)

    @property
    def _closing(self) -> str:
        return "]" if self._in_list else "}"


def _with(container: Container, name: str, value: Any) -> Container:
    if isinstance(container, list):
        container.append(value)
    else:
        container[name] = value
    return container
