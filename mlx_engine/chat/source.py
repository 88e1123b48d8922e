"""The text of an answer as a parser reads it: what has come, and a place in it.

A parser is a generator. It yields where it needs more text, and goes on when there is more or the
answer has ended; so each syntax is a function that reads from left to right, however the text
was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")

# What reads: it yields for more text, and returns what it has read.
Steps = Generator[None, None, T]
Emit = Callable[[str], object]

# A pattern of the module ``regex``, which tells whether more text could still make a match.
Pattern = Any
Match = Any

_WINDOW = 4096  # characters; more than any pattern for a place matches

_MOST_KNOWN = 4096  # characters

_SPACE = re.compile(r"\s*")


class Malformed(Exception):
    """The text goes on in a way that its syntax does not have."""


class CutOff(Malformed):
    """The text ends where its syntax goes on."""

    def __init__(self) -> None:
        super().__init__("the call was cut off")


class _Plain:
    """The characters with which no match of a pattern begins, as far as they were met."""

    __slots__ = ("_begins", "_pattern", "_plain")

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._plain: set[str] = set()
        self._begins: set[str] = set()

    def has(self, text: str) -> bool:
        """Whether the text has such characters only."""
        if self._plain.issuperset(text):
            return True
        if not self._begins.isdisjoint(text):
            return False
        return all(char in self._plain or self._is_plain(char) for char in text)

    def _is_plain(self, char: str) -> bool:
        """Whether no match begins with a character that was not met before."""
        plain = self._pattern.match(char, partial=True) is None
        known = self._plain if plain else self._begins
        if len(known) < _MOST_KNOWN:
            known.add(char)
        return plain


@lru_cache(maxsize=256)
def _plain(pattern: Pattern) -> _Plain:
    return _Plain(pattern)


class Source:
    """Text that comes in parts, and the place up to which it was read.

    What was read is dropped, but for the last character, which a pattern may look back at, and
    while a call is recorded.

    Attributes:
        text: the part that is held.
        at: the place in it.
        ended: no more will come.
    """

    __slots__ = (
        "_given",
        "_kept",
        "_kept_length",
        "_passing",
        "_recording",
        "_start",
        "at",
        "ended",
        "text",
    )

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._passing: tuple[_Plain, Emit] | None = None  # while all is read, and a match awaited
        self._recording = False
        self._kept: list[str] = []
        self._kept_length = 0
        self._start = 0  # what is recorded goes on here in the text
        self._given = 0

    def add(self, text: str) -> None:
        """Take the next part."""
        if self._recording and self.at > self._start:
            self._kept.append(self.text[self._start : self.at])
            self._kept_length += self.at - self._start
        start = self.at - 1 if self.at else 0
        self.text = self.text[start:] + text
        self.at -= start
        self._start = self.at

    def passes(self, text: str) -> bool:
        """Emit the next part, if what is looked for cannot begin in it; else it is not taken.

        Most of an answer is such text, for which nothing has to be searched.
        """
        if self._passing is None or self._recording or not text:
            return False
        plain, emit = self._passing
        if not plain.has(text):
            return False
        self.text, self.at = text[-1], 1
        emit(text)
        return True

    # Reading: each of these waits until it can tell.

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def skip_space(self) -> Steps[str]:
        """The next character that is no white space, behind which nothing is read yet."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            yield

    def look(self, pattern: Pattern) -> Steps[Match | None]:
        """The pattern's match here, not read yet."""
        while True:
            # A pattern with a text that it must have is looked for in all that is given.
            window = self.at + _WINDOW
            found = pattern.match(self.text, self.at, window, partial=True)
            if found is not None and found.partial:
                found = pattern.match(self.text, self.at, partial=not self.ended)
            if found is None or not found.partial:
                return found
            yield

    def read(self, pattern: Pattern) -> Steps[Match | None]:
        """The pattern's match here, read if there is one."""
        found = yield from self.look(pattern)
        if found is not None:
            self.at = found.end()
        return found

    def expect(self, pattern: Pattern, what: str) -> Steps[Match]:
        """The pattern's match here, read.

        Raises:
            Malformed: there is none.
        """
        found = yield from self.read(pattern)
        if found is None:
            self.fail(what)
        return found

    def fail(self, what: str) -> None:
        """Raise the error for text that goes on otherwise than with this."""
        if self.ended and self.at >= len(self.text):
            raise CutOff
        raise Malformed(f"{what} is expected before {self.text[self.at]!r}")

    def find(self, pattern: Pattern, emit: Emit, last: Pattern = None) -> Steps[Match | None]:
        """The first match, not read yet; what is before it is read and emitted.

        Args:
            pattern: to look for.
            emit: gets the text that can be no part of a match.
            last: the pattern to look for when the answer has ended, if that is another one.

        Returns:
            The match, or ``None`` at the end of the answer.
        """
        while True:
            if self.ended:
                found = (last or pattern).search(self.text, self.at)
            else:
                found = pattern.search(self.text, self.at, partial=True)
            start = len(self.text) if found is None else found.start()
            if start > self.at:
                emit(self.text[self.at : start])
                self.at = start
            if found is not None and not found.partial:
                return found
            if self.ended:
                return None
            self._passing = (_plain(pattern), emit) if found is None else None
            yield
            self._passing = None

    # Recording what a call is written as.

    def record(self, before: str = "") -> None:
        """Keep what is read from here on, with what was before it."""
        self._recording = True
        self._kept = [before] if before else []
        self._kept_length, self._given = len(before), 0
        self._start = self.at

    def so_far(self) -> str:
        """The text that was read since then."""
        return "".join((*self._kept, self.text[self._start : self.at]))

    def put_back(self, text: str) -> None:
        """Have this text before what is read next."""
        self.text = text + self.text[self.at :]
        self.at = self._start = 0

    def stop_recording(self) -> None:
        """Keep no more of it."""
        self._recording = False
        self._kept.clear()

    def fresh(self) -> str:
        """The text that was read since the recording began, or since this was asked for."""
        length = self._kept_length + self.at - self._start
        missing, self._given = length - self._given, max(length, self._given)
        if missing <= 0:
            return ""
        parts = [self.text[max(self._start, self.at - missing) : self.at]]
        missing -= len(parts[0])
        for part in reversed(self._kept):
            if missing <= 0:
                break
            parts.append(part[-missing:])
            missing -= len(parts[-1])
        return "".join(reversed(parts))

    def rewind(self) -> None:
        """Go back to where the recording began; what ``fresh`` has given it does not give again."""
        if self._kept:
            self.text = "".join((*self._kept, self.text[self._start :]))
            self._kept.clear()
            self._kept_length = self._start = 0
        self.at = self._start
