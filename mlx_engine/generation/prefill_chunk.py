"""The size of prefill chunks: what is asked for, or less where that would take long."""

from __future__ import annotations

_LONGEST = 1.0  # seconds, roughly: a cancelled request leaves with its chunk
_SMALLEST = 16  # tokens, however slow the model is


class PrefillChunk:
    """The size of a model's prefill chunks.

    It is halved as often as a chunk takes longer than a second, and doubled again while one takes
    less than a quarter of that: so a model that is fast has the same chunks always, of all the
    tokens that may be in one.

    Args:
        most: tokens.
        fixed: whether it stays that, since answers depend on where chunks begin.
    """

    def __init__(self, most: int, *, fixed: bool) -> None:
        self._most = most
        self._fixed = fixed
        self._halvings = 0

    @property
    def tokens(self) -> int:
        """Tokens of the next chunk."""
        return self._most >> self._halvings

    def is_long(self, token_seconds: float) -> bool:
        """Whether a chunk takes long if a token takes so many seconds."""
        return token_seconds * self.tokens > _LONGEST

    def expect(self, token_seconds: float) -> None:
        """Begin with a size that suits a model which takes so many seconds a token, or fewer."""
        while self.is_long(token_seconds) and self._halve():
            pass

    def took(self, seconds: float, tokens: int) -> None:
        """Learn that a chunk of so many tokens took so long."""
        if seconds > _LONGEST:
            self._halve()
        elif seconds < _LONGEST / 4 and tokens >= self.tokens and self._halvings:
            self._halvings -= 1

    def _halve(self) -> bool:
        if self._fixed or self.tokens // 2 < _SMALLEST:
            return False
        self._halvings += 1
        return True
