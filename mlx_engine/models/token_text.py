"""The text of single tokens, and their bytes, for log-probabilities."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.models.detokenizer import make_detokenizer
from mlx_engine.models.fast_decoder import REPLACEMENT, bytes_of_token


class TokenTexts:
    """Texts of the tokens of one tokenizer, each as in the middle of a text.

    ``decode`` of one token takes it for the first of a text, and many tokenizers leave out the
    space in front of that. Each text is made once for a tokenizer.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._known = _known.setdefault(tokenizer, {})
        self._before: list[int] = tokenizer.encode("a", add_special_tokens=False)
        self._start = self._text_of(self._before)

    def __call__(self, token: int) -> tuple[str, bytes]:
        """The text of a token, and its bytes, of which a character may have some from others."""
        known = self._known.get(token)
        if known is None:
            text = self._text_of([*self._before, token])[len(self._start) :]
            known = self._known[token] = text, self._bytes_of(token, text)
        return known

    def _bytes_of(self, token: int, text: str) -> bytes:
        string = self._tokenizer.convert_ids_to_tokens(token) if REPLACEMENT in text else None
        return bytes_of_token(string) if isinstance(string, str) else text.encode()

    def _text_of(self, tokens: list[int]) -> str:
        detokenizer = make_detokenizer(self._tokenizer)
        return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()


# Texts alone: what held the tokenizer here would keep it for ever.
_known: WeakKeyDictionary[TokenizerWrapper, dict[int, tuple[str, bytes]]] = WeakKeyDictionary()
