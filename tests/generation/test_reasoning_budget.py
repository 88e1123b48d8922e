"""Budgets of reasoning: what is forced depends on the tokens, and on nothing else (I9)."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_engine.generation.reasoning_budget import ReasoningBudget, ReasoningClose, only
from tests.conftest import on_mlx_thread
from tests.generation.tokenizers import KINDS, byte_fallback, byte_level, fast
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.anyio

TEXT = "\n</think>\n\n"
THINK, END = 258, 259


class Marked:
    """Reasoning between ``<think>`` and ``</think>``, once or any number of times."""

    def __init__(self, opened: bool = True, once: bool = False) -> None:
        self._text = "<think>" if opened else ""
        self._once = once

    @property
    def in_reasoning(self) -> bool:
        opened, closed = self._text.rfind("<think>"), self._text.rfind("</think>")
        return opened > closed and not (self._once and closed >= 0)

    @property
    def reasoning_over(self) -> bool:
        return self._once and "</think>" in self._text

    def feed(self, text: str) -> None:
        self._text += text


class Deaf(Marked):
    """Never hears that reasoning has been closed."""

    @property
    def in_reasoning(self) -> bool:
        return True


TOKENIZER = TokenizerWrapper(make_tokenizer())


def ids(text: str, tokenizer: TokenizerWrapper = TOKENIZER) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


CLOSE = ReasoningClose(TOKENIZER, TEXT)


def budget(
    limit: int,
    answer: list[int],
    make: Callable[[], Marked] = Marked,
    close: ReasoningClose = CLOSE,
) -> ReasoningBudget:
    return ReasoningBudget(limit, close, TOKENIZER, make, answer)


def written(given: ReasoningBudget, answer: list[int], script: str) -> str:
    """The answer of a model that says what the script does, where it may."""
    for token in ids(script):
        while (forced := given.forced(len(answer), [], mx.zeros((1, 1)))) is not None:
            answer.append(forced)
        answer.append(token)
    while (forced := given.forced(len(answer), [], mx.zeros((1, 1)))) is not None:
        answer.append(forced)
    return str(TOKENIZER.decode(answer))


@pytest.mark.parametrize(
    ("limit", "script", "answer"),
    [
        (0, "abc", f"{TEXT}abc"),
        (2, "abcd", f"ab{TEXT}cd"),
        (9, "abcd", "abcd"),
        (2, "a</think>bcd", "a</think>bcd"),
        (2, "ab</think>cd", f"ab{TEXT}</think>cd"),
        (3, "ab</think>cd", "ab</think>cd"),
        (2, "a\nbc", "a\n</think>\n\nbc"),
        (2, "\n\nbc", "\n\n</think>\n\nbc"),
        (3, "ébc", f"éb{TEXT}c"),
        (1, "é", f"�{TEXT}�"),
        (3, "a</thi", f"a</{TEXT}thi"),
    ],
)
@on_mlx_thread
def test_reasoning_is_closed_when_its_tokens_are_used(limit: int, script: str, answer: str) -> None:
    tokens: list[int] = []
    for once in (False, True):
        tokens.clear()
        given = budget(limit, tokens, partial(Marked, once=once))
        assert written(given, tokens, script) == answer


@on_mlx_thread
def test_reasoning_that_the_model_opens_counts_from_there() -> None:
    opened = partial(Marked, opened=False)
    tokens: list[int] = []
    assert written(budget(2, tokens, opened), tokens, "ab<think>cde") == f"ab<think>cd{TEXT}e"
    tokens = []
    assert written(budget(0, tokens, opened), tokens, "ab<think>c") == f"ab<think>{TEXT}c"
    tokens = []
    script, answer = "<think>a</think>b<think>cde", f"<think>a</think>b<think>{TEXT}cde"
    assert written(budget(2, tokens, opened), tokens, script) == answer


@on_mlx_thread
def test_what_does_not_close_reasoning_is_said_once() -> None:
    tokens: list[int] = []
    assert written(budget(1, tokens, Deaf), tokens, "abc") == f"a{TEXT}bc"


def expected(tokens: list[int], limit: int, make: Callable[[], Marked]) -> int | None:
    """What is forced behind these tokens, by the plainest rule."""

    def is_open(count: int) -> bool:
        reader = make()
        reader.feed(TOKENIZER.decode(tokens[:count]))
        return reader.in_reasoning

    run: tuple[int, ...] = ()
    start, used, armed = 0, 0, True
    for count in range(len(tokens) + 1):
        armed = armed or not is_open(count)
        if armed and is_open(count) and used >= limit and count >= start + len(run):
            start, armed = count, False
            run = CLOSE.behind(TOKENIZER.decode(tokens[:count]))
        used += is_open(count)
    return run[len(tokens) - start] if len(tokens) - start < len(run) else None


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("once", [True, False])
@on_mlx_thread
def test_what_is_forced_is_a_function_of_the_tokens(opened: bool, once: bool) -> None:
    """Whatever has been asked before: proposals that were wrong, other places, in any order."""
    draw = random.Random(7)
    choice = [*ids("ab\n"), *ids("é"), *ids("\n"), THINK, END, END]
    for _ in range(60):
        limit, answer = draw.randrange(7), list[int]()
        make = partial(Marked, opened, once)
        given = budget(limit, answer, make)
        while len(answer) < 16:
            for _ in range(draw.randrange(3)):
                tail: list[int] = []
                for _ in range(draw.randrange(4)):
                    forced = expected([*answer, *tail], limit, make)
                    tail.append(draw.choice(choice) if forced is None else forced)
                known = draw.randrange(len(answer) + 1)
                later = [draw.choice(choice) for _ in range(draw.randrange(3))]
                ahead = [mx.array([*answer[known:], *tail, *later], dtype=mx.uint32)]
                place = len(answer) + len(tail)
                assert given.forced(place, ahead, mx.zeros((1, 1)), len(later)) == expected(
                    [*answer, *tail], limit, make
                )
            forced = expected(answer, limit, make)
            assert given.forced(len(answer), [], mx.zeros((1, 1))) == forced
            answer.append(draw.choice(choice) if forced is None else forced)


@on_mlx_thread
def test_tokens_are_waited_for_only_where_they_can_matter() -> None:
    class Unread:
        def tolist(self) -> list[int]:
            raise AssertionError("waited for")

    answer: list[int] = []
    given = budget(5, answer)
    for token in ids("abcd"):
        assert given.forced(len(answer) + 1, [Unread()], mx.zeros((1, 1))) is None  # type: ignore[list-item]
        answer.append(token)
    assert given.forced(4, [Unread()], mx.zeros((1, 1))) is None  # type: ignore[list-item]
    assert given.forced(5, [mx.array(ids("e"))], mx.zeros((1, 1))) == CLOSE.tokens[0]
    answer += ids("e")
    for n in range(4):
        assert given.forced(5 + n, [Unread()], mx.zeros((1, 1))) == CLOSE.tokens[n]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="known"):
        given.forced(9, [mx.array(CLOSE.tokens[1:])], mx.zeros((1, 1)))


@pytest.mark.parametrize(
    ("before", "tokens"),
    [
        ("", ids(TEXT)),
        ("so", ids(TEXT)),
        ("so\n", ids("</think>\n\n")),
        ("\n", ids("</think>\n\n")),
        ("so\n</thi", ids(TEXT)),
        ("so</think", ids(TEXT)),
        ("so`</think>", ids("\n\n")),
        ("so\n</think>\n", ids("\n")),
    ],
)
def test_a_marker_of_one_token_is_not_completed_by_letters(
    before: str, tokens: tuple[int, ...]
) -> None:
    assert CLOSE.behind(before) == tokens


def test_a_marker_is_no_quoted_one() -> None:
    close = ReasoningClose(TOKENIZER, "</think>")
    assert close.behind("so") == ids("</think>")
    assert close.behind("so`") == ids("\n</think>")
    assert CLOSE.behind("so`") == ids(TEXT)


def in_pieces() -> TokenizerWrapper:
    """A byte-level tokenizer that knows no marker."""
    return fast(byte_level())


@pytest.mark.parametrize("size", range(1, len("\n</reason日>\n\n")))
@pytest.mark.parametrize("make", [in_pieces, KINDS["byte fallback"]], ids=["bytes", "words"])
def test_a_marker_of_many_tokens_is_completed(
    make: Callable[[], TokenizerWrapper], size: int
) -> None:
    tokenizer, text = make(), "\n</reason日>\n\n"
    close = ReasoningClose(tokenizer, text)
    for start in (0, 1) if size > 1 else (0,):  # with a line break before it, and without
        before = "It is so" + text[start:size]
        tokens = ids(before, tokenizer)
        whole = tokenizer.decode([*tokens, *close.behind(before)])
        assert whole == tokenizer.decode(tokens) + text[size:]


def marked(backend: Tokenizer) -> TokenizerWrapper:
    backend.add_tokens([AddedToken("</think>", normalized=False)])
    return fast(backend)


def piecewise(scheme: str) -> Tokenizer:
    """SentencePiece's pieces, with a space before the first word of a text."""
    pieces = ["<unk>", "▁", "a", "\n", "\n\n", "</think>", "<", "/", ">", "▁a", "t", "h", "i", "n"]
    tokenizer = Tokenizer(models.Unigram([(each, -1.0 - n) for n, each in enumerate(pieces)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


@pytest.mark.parametrize(
    "backend",
    [
        byte_level,
        lambda: byte_fallback(*[decoders.Replace("▁", " "), decoders.ByteFallback()]),
        lambda: piecewise("always"),
        lambda: piecewise("first"),
    ],
    ids=["byte-level", "byte fallback", "always a space", "a space first"],
)
def test_no_space_comes_before_what_closes_reasoning(backend: Callable[[], Tokenizer]) -> None:
    tokenizer = marked(backend())
    close = ReasoningClose(tokenizer, TEXT)
    start = ids("a", tokenizer)
    assert tokenizer.decode([*start, *close.tokens]) == tokenizer.decode(start) + TEXT
    assert len(close.tokens) <= 4


@pytest.mark.parametrize("kind", KINDS)
@on_mlx_thread
def test_any_tokenizer_has_something_to_close_reasoning_with(kind: str) -> None:
    tokenizer = KINDS[kind]()
    close = ReasoningClose(tokenizer, TEXT)
    answer: list[int] = []
    given = ReasoningBudget(1, close, tokenizer, Marked, answer)
    for _ in range(3 + len(close.tokens)):
        forced = given.forced(len(answer), [], mx.zeros((1, 1)))
        answer.append(ids("a", tokenizer)[0] if forced is None else forced)
    assert tuple(answer[1 : 1 + len(close.tokens)]) == close.tokens


@on_mlx_thread
def test_nothing_is_left_but_the_forced_token() -> None:
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        logits = mx.array([[1.0, 2.0, 3.0], [-mx.inf, 5.0, 6.0], [7.0, 8.0, mx.nan]], dtype=dtype)
        assert only([None] * 3, logits) is logits
        kept = only([1, 0, None], logits)
        assert kept.dtype == dtype
        inf = float("inf")
        assert kept[:2].tolist() == [[-inf, 2.0, -inf], [0.0, -inf, -inf]]
        assert mx.array_equal(kept[2], logits[2], equal_nan=True)
        broken = only([None, None, 2], logits)
        assert mx.isnan(broken[2, 2]).item(), "a model that is broken is not taken for a sound one"
