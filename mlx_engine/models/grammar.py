"""Grammars of answers, compiled for one tokenizer. No MLX."""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that is ready to be followed, by any number of answers at once.

    Attributes:
        vocab_size: tokens that the logits cover, those without a text included.
        ends: token ids that end an answer; allowed where the grammar is complete, and there only.
    """

    vocab_size: int
    ends: frozenset[int]
    _first: LLMatcher

    def matcher(self) -> LLMatcher:
        """A matcher of its own at the beginning of an answer."""
        return self._first.deep_copy()


class Grammars:
    """What compiles grammars for a model, and remembers them. From any thread but MLX's.

    Args:
        tokenizer: of the model.
        vocab_size: tokens that the logits cover.
        ends: token ids that end an answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = ends
        self._trie: LLTokenizer | None = None

    def compile(self, lark: str, option: str = "constraint") -> CompiledGrammar:
        """The grammar of a whole answer, compiled.

        Args:
            lark: in llguidance's variant of Lark; its ``start`` is a whole answer.
            option: what a caller calls it, for errors.

        Raises:
            InvalidRequest: it is no grammar, or too large.
            Interrupted: the work was told to stop.
        """
        if self._trie is None:
            fast = self._tokenizer._tokenizer
            self._trie = from_tokenizer(fast, self._vocab_size, sorted(self._ends))
        matcher = LLMatcher(self._trie, LLMatcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            raise InvalidRequest(option, matcher.get_error())
        return CompiledGrammar(self._vocab_size, self._ends, matcher)
