"""Constraints by hand: a logits processor that masks plain decoding, step by step.

The matcher begins anew at each step and reads the whole answer, so that it cannot be out of step.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from mlx_engine import BaseEngine, GenerationResult
from mlx_engine.constraints import Constraint


def trie(vocabulary: Any) -> LLTokenizer:
    return _trie(vocabulary.tokenizer._tokenizer, vocabulary.vocab_size, vocabulary.eos)


@functools.cache
def _trie(tokenizer: Any, size: int, ends: frozenset[int]) -> LLTokenizer:
    return from_tokenizer(tokenizer, size, sorted(ends))


class ByHand:
    """A logits processor that lets nothing come but what a constraint allows.

    Args:
        vocabulary: of the model.
        constraint: of the answer.
        prompt: its length in tokens.
        goes_on: whether the answer ends only where it must.
    """

    def __init__(
        self, vocabulary: Any, constraint: Constraint, prompt: int, goes_on: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        lark = LLMatcher.grammar_from_lark(f"start: {constraint.rule}")
        self._first = LLMatcher(trie(vocabulary), lark, log_level=0)
        assert not self._first.get_error()
        self._prompt = prompt
        self._goes_on = goes_on

    def __call__(self, seen: mx.array, logits: mx.array) -> mx.array:
        tokens = seen[self._prompt :].tolist()
        if self._vocabulary.eos & set(tokens):
            return logits
        allowed = self.allowed(tokens)
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def allowed(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """Whether each token may come behind these."""
        matcher = self._first.deep_copy()
        assert matcher.consume_tokens(tokens), matcher.get_error()
        data = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        size = self._vocabulary.vocab_size
        found = np.unpackbits(data, bitorder="little", count=size).astype(bool)
        if self._goes_on:
            without = found.copy()
            without[sorted(self._vocabulary.eos)] = False
            if without.any():
                return without
        return found


def vocabulary_of(engine: BaseEngine) -> Any:
    return engine._holder.model().vocabulary  # type: ignore[attr-defined]


async def by_hand(
    engine: BaseEngine, prompt: list[int], constraint: Constraint, **options: Any
) -> GenerationResult:
    """The answer of plain decoding, masked by hand."""
    goes_on = options.pop("ignore_eos", False)
    own = [
        *options.pop("logits_processors", ()),
        ByHand(vocabulary_of(engine), constraint, len(prompt), goes_on),
    ]
    return await engine.generate(prompt, logits_processors=own, decode=None, **options)
