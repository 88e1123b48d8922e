"""Code in Markdown text, in which a marker is a quotation."""

from __future__ import annotations

import re

_EVENTS = re.compile(r"`+|\n")


class Quoting:
    """Whether the text so far ends within inline code, or within an open fence."""

    __slots__ = ("_blank", "_fence", "_inline", "_opening", "_ticks")

    def __init__(self) -> None:
        self._fence = 0  # backticks that opened it
        self._opening = False  # on the line that opened it, where one more run makes it inline code
        self._inline = 0  # backticks that opened the inline code
        self._blank = True  # the line has nothing but white space so far
        self._ticks = 0  # backticks at the end of the text, which may go on

    def feed(self, text: str) -> None:
        """Take the next part of the text."""
        if "`" not in text and "\n" not in text:
            self._plain(text)
            return
        at = 0
        for event in _EVENTS.finditer(text):
            self._plain(text[at : event.start()])
            if event.group() == "\n":
                self._end_run()
                self._blank, self._inline, self._opening = True, 0, False
            else:
                self._ticks += event.end() - event.start()
            at = event.end()
        self._plain(text[at:])

    def __bool__(self) -> bool:
        self._end_run()
        return bool(self._fence or self._inline)

    def _plain(self, text: str) -> None:
        if text:
            self._end_run()
            self._blank = self._blank and text.isspace()

    def _end_run(self) -> None:
        count, self._ticks = self._ticks, 0
        if not count:
            return
        if self._blank and count >= 3:
            if not self._fence:
                self._fence, self._opening = count, True
            elif count >= self._fence:
                self._fence = 0
        elif self._opening:
            self._fence, self._opening = 0, False
        elif not self._fence:
            self._inline = 0 if self._inline == count else self._inline or count
        self._blank = False
