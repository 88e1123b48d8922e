"""Random walks: answers of a model that knows nothing, as a grammar lets it."""

from __future__ import annotations

import random

import numpy as np
from llguidance import LLMatcher

from mlx_engine.models.grammar_compiler import CompiledGrammar

ENDING = 0.25  # chance to end where an answer may


def bits(matcher: LLMatcher, size: int) -> list[int]:
    """The tokens that are allowed next."""
    data = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    assert not matcher.is_error(), matcher.get_error()
    found: list[int] = np.flatnonzero(np.unpackbits(data, bitorder="little", count=size)).tolist()
    return found


def answer(grammar: CompiledGrammar, rng: random.Random, most: int) -> list[int] | None:
    """Tokens of a whole answer without its end; ``None`` if it did not come to one."""
    matcher, tokens = grammar.matcher(), list[int]()
    while len(tokens) < most:
        allowed = bits(matcher, grammar.vocab_size)
        assert allowed
        ends = grammar.ends.intersection(allowed)
        if ends and (len(ends) == len(allowed) or rng.random() < ENDING):
            assert matcher.is_accepting()
            return tokens
        tokens.append(rng.choice([token for token in allowed if token not in ends]))
        assert matcher.consume_token(tokens[-1]), matcher.get_error()
    return None
