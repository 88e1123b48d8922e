"""Text from tokens for a tokenizer of which nothing is known but ``decode``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mlx_engine.models.fast_decoder import REPLACEMENT

_CONTEXT = 8  # tokens that are decoded again with each new one; a window has some more
_LONGEST = 8 * _CONTEXT  # tokens in a window that cannot be moved on well
_PARTIAL = 3  # a character of four bytes has at most so many that are not its last


class Window:
    """Text of a new token: what decoding the last few with it gives beyond decoding them without.

    The cost of a token is bounded, whatever the tokens are: the window moves on even where
    they never become a character.

    Args:
        decode: gives the text of a list of token ids.
        known: tells whether the tokenizer has a token; one that it does not have has no text.
        lag: how many more tokens must leave a text as it is before it is given out.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], known: Callable[[int], bool], lag: int = 0
    ) -> None:
        self._decode = decode
        self._known = known
        self._tokens: list[int] = []
        self._text = ""  # of the tokens in the window
        self._given = 0  # characters of it that have been given out
        self._any = False  # text has been given out
        self._earlier: deque[str] = deque(maxlen=lag)  # what was not given, of the last decodes

    def feed(self, token: int) -> list[str]:
        """The text that is certain with this token."""
        if not self._known(token):
            return []
        if len(self._tokens) >= 2 * _CONTEXT:
            self._move_on()
        self._tokens.append(token)
        self._text = self._decode(self._tokens)
        rest = self._text[self._given :]
        end = _complete(rest)
        if self._earlier.maxlen:
            full = len(self._earlier) == self._earlier.maxlen
            end = min(end, _common([*self._earlier, rest])) if full else 0
            self._earlier.append(rest)
            self._earlier = deque((old[end:] for old in self._earlier), self._earlier.maxlen)
        self._given += end
        self._any |= end > 0
        return [rest[:end]] if end else []

    def finish(self) -> list[str]:
        """The text that is still held."""
        return [self._text[self._given :]]

    def _move_on(self) -> None:
        rest = self._text[self._given :]
        kept = self._tokens[-_CONTEXT:]
        text = self._decode(kept)
        # What is held must come out alike, and not as the beginning of a text.
        if not (text.endswith(rest) and (len(text) > len(rest) or not self._any)):
            if len(self._tokens) < _LONGEST:
                return
            kept = self._tokens[:_CONTEXT] + kept
            text = self._decode(kept)
        self._tokens, self._text, self._given = kept, text, max(0, len(text) - len(rest))


class Whole:
    """Text all at the end: for a tokenizer whose text can change from its beginning.

    Args:
        decode: gives the text of a list of token ids.
        known: tells whether the tokenizer has a token.
    """

    def __init__(self, decode: Callable[[list[int]], str], known: Callable[[int], bool]) -> None:
        self._decode = decode
        self._known = known
        self._tokens: list[int] = []

    def feed(self, token: int) -> list[str]:
        """Nothing yet."""
        if self._known(token):
            self._tokens.append(token)
        return []

    def finish(self) -> list[str]:
        """The text of all tokens."""
        return [self._decode(self._tokens)] if self._tokens else []


def _complete(text: str) -> int:
    """Characters before those at the end that may be parts of one."""
    end = len(text)
    while end > max(len(text) - _PARTIAL, 0) and text[end - 1] == REPLACEMENT:
        end -= 1
    return end


def _common(texts: list[str]) -> int:
    """How many characters all of them begin with."""
    one, other = min(texts), max(texts)
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), len(one))
