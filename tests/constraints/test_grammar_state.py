"""The state of a constraint: a function of the tokens, and of nothing else (I9)."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.constraints import Choice, Constraint, JSONSchema, Regex
from mlx_engine.generation.constraint import GrammarState, empty_masks, fill_all, masked
from mlx_engine.models.grammar_compiler import CompiledGrammar, Grammars
from mlx_engine.models.vocabulary import Vocabulary
from tests.conftest import on_mlx_thread
from tests.constraints.by_hand import ByHand
from tests.constraints.schemas import EDIT, SHAPES, TREE
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.anyio

EOS, OTHER_EOS, SIZE = 257, 261, 300
TOKENIZER = TokenizerWrapper(make_tokenizer())
ENDS = frozenset({EOS, OTHER_EOS})
GRAMMARS = Grammars(TOKENIZER, SIZE, ENDS)
VOCABULARY = Vocabulary(TOKENIZER, ENDS, SIZE, None, 8, (), GRAMMARS)
LOGITS = mx.zeros((1, SIZE))
CONSTRAINTS: list[Constraint] = [
    JSONSchema(EDIT),
    JSONSchema(TREE),
    JSONSchema(SHAPES),
    Regex("[ab]{2,5}(née)?"),
    Choice(["yes", "yesterday"]),
]


class Mute:
    """A matcher that lets nothing come."""

    def is_error(self) -> bool:
        return False

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        pass


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def state_of(constraint: Constraint, answer: list[int], goes_on: bool = False) -> GrammarState:
    compiled = GRAMMARS.compile(f"start: {constraint.rule}")
    return GrammarState(compiled, answer, goes_on=goes_on)


def allowed(
    state: GrammarState, place: int, ahead: list[int], draw: random.Random | None = None
) -> list[int]:
    state.go(place, ahead, draw.randrange(len(ahead) + 1) if draw else 0)
    words = empty_masks(1, LOGITS)
    state.fill(words[0])
    bits = np.unpackbits(words.view(np.uint8)[0], bitorder="little", count=SIZE)
    return [int(token) for token in np.flatnonzero(bits)]


def expected(by_hand: ByHand, tokens: list[int]) -> list[int]:
    if ENDS & set(tokens):
        return sorted(ENDS)
    return [int(token) for token in np.flatnonzero(by_hand.allowed(tokens))]


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda each: type(each).__name__)
def test_what_may_come_is_a_function_of_the_tokens(constraint: Constraint, goes_on: bool) -> None:
    """Whatever has been asked before: proposals that were wrong, other places, in any order."""
    draw = random.Random(3)
    by_hand = ByHand(VOCABULARY, constraint, 0, goes_on)
    for _ in range(12):
        answer: list[int] = []
        state = state_of(constraint, answer, goes_on)
        while len(answer) < 25 and not ENDS & set(answer):
            for _ in range(draw.randrange(4)):
                ahead: list[int] = []
                for _ in range(draw.randrange(5)):
                    if not ENDS & set(ahead):
                        ahead.append(draw.choice(expected(by_hand, [*answer, *ahead])))
                place = len(answer) + len(ahead)
                if draw.random() < 0.2:
                    place = draw.randrange(place + 1)
                tokens = [*answer, *ahead][:place]
                before = ahead if place >= len(answer) else []
                before = before[: max(0, place - len(answer))]
                assert allowed(state, place, before, draw) == expected(by_hand, tokens)
                if draw.random() < 0.3:
                    assert state.forced(len(answer)) == state_of(constraint, answer).forced(
                        len(answer)
                    )
            answer.append(draw.choice(expected(by_hand, answer)))
        assert state.fault is None


def test_proposals_are_allowed_up_to_the_first_that_is_not() -> None:
    answer = ids("{")
    state = state_of(
        JSONSchema({"type": "object", "required": ["a"], "properties": {"a": {}}}), answer
    )
    for proposals, count in [
        (ids('"a": 1}'), 7),
        ([*ids('"a": 1}'), EOS], 8),
        ([*ids('"a": 1}'), OTHER_EOS, EOS], 8),
        ([*ids('"a": 1'), EOS], 6),
        (ids('"a": x1}'), 5),
        (ids("x"), 0),
        ([SIZE - 1], 0),
        ([EOS], 0),
        ([], 0),
    ]:
        assert state.allowed(1, proposals) == count, proposals
    assert state.forced(1) == ids('"a": ')
    assert state.fault is None


def test_what_is_forced_ends_where_there_is_a_choice() -> None:
    answer: list[int] = []
    state = state_of(Regex("abc[de]f"), answer)
    assert state.forced(0) == ids("abc")
    answer += ids("ab")
    assert state.forced(2) == ids("c")
    answer += ids("c")
    assert state.forced(3) == []
    answer += ids("d")
    assert state.forced(4) == ids("f")
    answer += ids("f")
    assert state.forced(5) == []
    assert allowed(state, 5, []) == sorted(ENDS)


def test_a_token_of_the_answer_that_is_not_allowed_fails_it_for_good() -> None:
    state = state_of(Regex("ab"), ids("x"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not allow token 0"):
            state.go(1)
    with pytest.raises(RuntimeError, match="does not allow token 0"):
        state.fill(empty_masks(1, LOGITS)[0])
    words = empty_masks(2, LOGITS)
    fill_all(words, [state, None])
    assert words.any(axis=1).tolist() == [False, True]


def test_tokens_that_are_not_known_fail_it() -> None:
    with pytest.raises(RuntimeError, match="of 3 uncertain tokens, 1 are known"):
        state_of(Regex("[a-z]+"), ids("ab")).go(5, ids("c"))


def test_where_no_token_can_come_the_answer_fails() -> None:
    """As with a vocabulary that lacks the bytes of a text."""
    matcher = Mute()
    grammar = Mock(spec=CompiledGrammar, vocab_size=SIZE, ends=ENDS)
    grammar.matcher.return_value = matcher
    state = GrammarState(grammar, [])
    with pytest.raises(RuntimeError, match="no token that the model has"):
        state.fill(empty_masks(1, LOGITS)[0])
    assert state.fault is not None


@on_mlx_thread
def test_logits_are_masked_to_the_bit_in_every_dtype() -> None:
    draw = np.random.default_rng(1)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for size in (1, 31, 32, 33, 300):
            logits = mx.random.normal((3, size)).astype(dtype)
            words = draw.integers(-(2**31), 2**31, (3, (size + 31) // 32), np.int64)
            words = words.astype(np.int32)
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=size)
            wanted = mx.where(mx.array(bits == 1), logits, mx.array(-mx.inf, dtype))
            got = masked(logits, words)
            assert got.dtype == dtype
            assert mx.array_equal(got, wanted)
    broken = masked(mx.array([[mx.nan, 1.0]]), np.array([[1]], np.int32))
    assert mx.isnan(broken[0, 0]).item(), "what is broken shows"


def test_rows_are_filled_together_as_by_themselves() -> None:
    texts: list[Any] = ['{"path": "', "[", '{"kind": "l', "ab", "yes"]
    states = [
        state_of(constraint, ids(text) if text != "[" else [])
        for constraint, text in zip(CONSTRAINTS, texts, strict=True)
    ]
    for state in states:
        state.go(len(state._answer))
    rows = [states[0], None, *states[1:]]
    words = empty_masks(len(rows), LOGITS)
    fill_all(words, rows)
    assert (words[1] == -1).all()
    for state, row in zip(rows, words, strict=True):
        if state is not None:
            alone = empty_masks(1, LOGITS)
            state.fill(alone[0])
            assert (alone[0] == row).all()
            assert alone.any()
