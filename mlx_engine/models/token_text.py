"""The text of single tokens, for those that are told beside an answer: log-probabilities."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.models.detokenizer import make_detokenizer


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

    def __call__(self, token: int) -> str:
        """The text of a token."""
        text = self._known.get(token)
        if text is None:
            text = self._text_of([*self._before, token])[len(self._start) :]
            self._known[token] = text
        return text

    def _text_of(self, tokens: list[int]) -> str:
        detokenizer = make_detokenizer(self._tokenizer)
        return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()


# Texts alone: what held the tokenizer here would keep it for ever.
_known: WeakKeyDictionary[TokenizerWrapper, dict[int, str]] = WeakKeyDictionary()
