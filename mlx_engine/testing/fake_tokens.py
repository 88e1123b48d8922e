"""Tokens of a ``FakeEngine``: a word is one."""

from __future__ import annotations

import re
import zlib
from typing import Final

END: Final = 0  # the end-of-sequence token
_MOST: Final = 100_000  # texts to remember


def words(text: str) -> list[str]:
    """The text in pieces: words with the spaces before them."""
    return re.findall(r"\s*\S+|\s+", text)


class TokenTexts:
    """Texts of tokens, as far as they were seen. From any thread."""

    def __init__(self) -> None:
        self._known = {END: ""}

    def token(self, text: str) -> int:
        """The token of a text, which is remembered."""
        token = token_id(text)
        if len(self._known) < _MOST:
            self._known.setdefault(token, text)
        return token

    def text(self, token: int) -> str:
        """The text of a token."""
        return self._known.get(token, f"<{token}>")


def token_id(text: str) -> int:
    """The token id of a piece: always the same one, and not that of the end."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) or 1
