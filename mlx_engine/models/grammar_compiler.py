"""Grammars of answers, compiled for one tokenizer. No MLX."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlx_engine.checks import shown
from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import InvalidRequest, describe
from mlx_engine.models.grammar_problem import explained

MOST_CHARACTERS = 2**20  # of one grammar
KEPT, KEPT_CHARACTERS = 128, 2**22  # compiled grammars
_LOOK = 0.05  # seconds between two looks at whether to stop, while another thread builds the trie
_TRIED = 200  # tokens, to see whether their text is what the trie has
_SAMPLE = '{"Straße": [1, -2.5e3, true, null], "b": "x y"}'

# Measured on one slow core: the worst that is let through compiles in a second, and takes some
# 20 ms for one mask. What passes a limit later on is an error of its matcher.
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=25_000,  # some 2 kB each
    max_grammar_size=100_000,
    precompute_large_lexemes=False,  # or a long text costs a walk through the vocabulary
    verbose_errors=False,  # they tell the answer so far
)


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
    """Grammars for one model: compiled, and those of late remembered. From any thread but MLX's.

    The tokenizer's trie, which takes a second for a large vocabulary, is built with the first
    grammar.

    Args:
        tokenizer: of the model.
        vocab_size: tokens that the logits cover.
        ends: token ids that end an answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = ends
        self._building = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._changing = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def compile(self, lark: str, option: str = "constraint") -> CompiledGrammar:
        """The grammar of a whole answer, compiled.

        Args:
            lark: in llguidance's variant of Lark; its ``start`` is a whole answer.
            option: what a caller calls it, for errors.

        Raises:
            InvalidRequest: it is no grammar, too large, or nothing satisfies it.
            Interrupted: the work was told to stop.
        """
        with self._changing:
            if (known := self._compiled.get(lark)) is not None:
                self._compiled.move_to_end(lark)
                return known
        if len(lark) > MOST_CHARACTERS:
            raise InvalidRequest(
                option, f"is a grammar of {len(lark)} characters; {MOST_CHARACTERS} are the most"
            )
        checkpoint()
        trie = self._built(option)
        checkpoint()
        matcher = LLMatcher(trie, LLMatcher.grammar_from_lark(lark), log_level=0, limits=LIMITS)
        if not matcher.is_error():
            checkpoint()
            # What all answers begin with is gone through here: it may be long.
            allowed = matcher.compute_bitmask()
            if not matcher.is_error() and not any(allowed):
                raise InvalidRequest(option, "nothing satisfies it")
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            raise InvalidRequest(option, explained(lark, problems[0], LIMITS))
        compiled = CompiledGrammar(self._vocab_size, self._ends, matcher)
        with self._changing:
            self._compiled[lark] = compiled
            while len(self._compiled) > KEPT or sum(map(len, self._compiled)) > KEPT_CHARACTERS:
                self._compiled.popitem(last=False)
        return compiled

    def _built(self, option: str) -> LLTokenizer:
        """The trie of the tokenizer; one thread builds it, others wait."""
        while not self._building.acquire(timeout=_LOOK):
            checkpoint()
        try:
            if self._trie is None:
                self._trie = _trie(self._tokenizer, self._vocab_size, self._ends, option)
            return self._trie
        finally:
            self._building.release()


def _trie(
    tokenizer: TokenizerWrapper, vocab_size: int, ends: frozenset[int], option: str
) -> LLTokenizer:
    inner = tokenizer._tokenizer
    name = type(inner).__name__
    if not isinstance(inner, PreTrainedTokenizerFast):
        raise InvalidRequest(
            option,
            f"the model's tokenizer, {name}, has no fast implementation, which constraints need: "
            "a tokenizer.json",
        )
    if not ends:
        raise InvalidRequest(option, "the model has no token that ends an answer; name one")
    try:
        trie = from_tokenizer(inner, vocab_size, sorted(ends))
        odd = _misread(trie, inner)
    except BaseException as error:  # the border: llguidance raises anything, and Rust panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest(
            option, f"the model's tokenizer, {name}, cannot be constrained: {describe(error)}"
        ) from error
    if odd is not None:
        raise InvalidRequest(
            option,
            f"the model's tokenizer, {name}, cannot be constrained: the text of its tokens "
            f"depends on others ({shown(odd)})",
        )
    return trie


def _misread(trie: LLTokenizer, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Text that the trie and the tokenizer have different tokens for; blanks before it aside."""
    sample = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    size = len(tokenizer)
    for tokens in (sample, *([token] for token in range(0, size, max(1, size // _TRIED)))):
        if any(trie.is_special_token(token) for token in tokens):
            continue
        data = trie.decode_bytes(tokens)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue  # a part of a character
        if text.lstrip() != str(tokenizer.decode(tokens)).lstrip():
            return text
    return None if trie.decode_bytes(sample).strip() == _SAMPLE.encode() else _SAMPLE
