"""Constraints at work: the tokens that may come next in an answer, by its grammar.

    tokens of the answer ─► GrammarState: its matcher is taken there ─► masks ─► logits

The state is a function of the tokens alone. A matcher remembers what it has read, so whoever asks
names the tokens. One matcher reads those that are certain; a copy of it reads what may come behind
them, proposals as a rule, and is dropped when others are named. Copies cost some microseconds.
llguidance 1.9.1 could take tokens back instead, but after some of its ``rollback`` a matcher's
masks are wrong. If a matcher fails at anything, it is asked nothing any more: the request fails,
for an answer that nobody watches may be any.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from mlx_engine.errors import describe
from mlx_engine.models.grammar_compiler import CompiledGrammar

Words = NDArray[np.int32]  # a bit for each token, of shape (rows, words) or (words,)

_WORD = 32


class GrammarState:
    """Where one answer is in its grammar.

    Made on any thread; asked on the MLX thread, at any place of the answer, in any order.

    Args:
        grammar: of the whole answer.
        answer: its tokens that are certain; the list grows.
        goes_on: whether it may end only where nothing but its end may come.

    Attributes:
        fault: what has gone wrong with the matcher; ``None`` where MLX has failed.
    """

    fault: BaseException | None = None

    def __init__(
        self, grammar: CompiledGrammar, answer: Sequence[int], *, goes_on: bool = False
    ) -> None:
        self._grammar = grammar
        self._answer = answer
        self._goes_on = goes_on
        self._ends = np.zeros((grammar.vocab_size + _WORD - 1) // _WORD, np.uint32)
        for token in grammar.ends:
            self._ends[token // _WORD] |= np.uint32(1 << token % _WORD)
        self._certain = 0  # tokens of the answer that the first matcher has read, and no end
        self._sampled: list[int] = []  # what it has read behind those, as they will be the answer's
        self._first = self._matcher = grammar.matcher()
        self._ahead: list[int] = []  # what the other one, if it is another, has read behind them
        self._over = False  # an end has come

    def apply(
        self, logits: mx.array, place: int, ahead: Sequence[mx.array], proposed: int = 0
    ) -> mx.array:
        """Logits of shape (n, vocabulary), those of tokens excluded that may not come.

        The model goes on computing them while the masks are made.

        Args:
            place: of the first of them: number of the token in the answer, counted from 0.
            ahead: tokens before the last of them, at least those that are not the answer's yet.
            proposed: how many at the end of ``ahead`` may turn out to be others.

        Raises:
            Exception: MLX failed; or what ``fault`` then is.
        """
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        tokens = [token for each in ahead for token in cast("list[int]", each.tolist())]
        rows = logits.shape[0]
        words = empty_masks(rows, logits)
        for i in range(rows):
            later = rows - 1 - i
            self.go(place + i, tokens[: len(tokens) - later], max(0, proposed - later))
            self.fill(words[i])
        return masked(logits, words)

    def apply_to_draft(
        self, logits: mx.array, place: int, proposals: Sequence[mx.array]
    ) -> mx.array:
        """Logits of a draft, of shape (1, vocabulary), those of tokens excluded that may not come.

        Behind a proposal that may not come, nothing is: it is going to be cut.

        Args:
            place: of the first proposal.
            proposals: those before, all of them.

        Raises:
            Exception: as of ``apply``.
        """
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        tokens = [token for each in proposals for token in cast("list[int]", each.tolist())]
        if self.follow(place + len(tokens), tokens, len(tokens)) < place + len(tokens):
            return logits
        words = empty_masks(1, logits)
        self.fill(words[0])
        return masked(logits, words)

    def go(self, place: int, ahead: Sequence[int] = (), proposed: int = 0) -> None:
        """Go to a place of the answer, the tokens before which were allowed when they came.

        Args:
            place, ahead, proposed: as of ``apply``.

        Raises:
            Exception: what ``fault`` then is.
        """
        if (came := self.follow(place, ahead, proposed)) < place:
            with self._noted():
                raise RuntimeError(
                    f"its constraint does not allow token {came} of its answer: all that it does "
                    "allow was excluded by logits processors, logit_bias or the end of reasoning "
                    "(max_reasoning_tokens), or the model's logits are NaN"
                )

    def follow(self, place: int, ahead: Sequence[int] = (), proposed: int = 0) -> int:
        """Go to a place of the answer, or as near to it as its constraint allows; where that is.

        Args:
            place, ahead, proposed: as of ``apply``.

        Raises:
            Exception: what ``fault`` then is.
        """
        with self._noted():
            tokens = self._between(self._certain, place, ahead)
            if tokens[: len(self._sampled)] != self._sampled or place < self._certain:
                self._certain, self._sampled, self._ahead = 0, [], []
                self._first = self._matcher = self._grammar.matcher()
                tokens = self._between(0, place, ahead)
            start = self._certain
            end, ends = len(tokens), self._grammar.ends
            if not ends.isdisjoint(tokens):
                end = next(i for i, token in enumerate(tokens) if token in ends)
            sure = max(len(self._sampled), min(end, len(tokens) - proposed))
            came = self._read(tokens[:sure])
            if came == sure:
                came += self._look(tokens[sure:end])
            self._over = came == end < len(tokens)
            return start + came + self._over

    def allowed(self, place: int, proposals: Sequence[int]) -> int:
        """The number of proposals for a place, and those behind it, that may come.

        Raises:
            Exception: what ``fault`` then is.
        """
        count = self.follow(place + len(proposals), proposals, len(proposals)) - place
        with self._noted():
            return count - (self._over and not self._matcher.is_accepting())

    def forced(self, place: int) -> list[int]:
        """Tokens of the text that alone may come at a place, as the tokenizer writes it.

        A model may choose to write it in others.

        Raises:
            Exception: what ``fault`` then is.
        """
        self.go(place)
        with self._noted():
            if self._over:
                return []
            tokens = self._matcher.compute_ff_tokens()
            self._check()
            return [*tokens]

    def fill(self, words: Words) -> None:
        """Set the bits of the tokens that may come where it is, and of no others.

        Raises:
            Exception: what ``fault`` then is.
        """
        with self._noted():
            if not self._over:
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._settle(words)

    def _settle(self, words: Words) -> None:
        """See whether the matcher has set them, and let ends come where they may."""
        if self._over:  # what is computed behind an end is not looked at
            words[:] = self._ends.view(np.int32)
            return
        self._check()
        if self._goes_on and (others := words & ~self._ends.view(np.int32)).any():
            words[:] = others
        if not words.any():
            raise RuntimeError("its constraint can be met by no token that the model has")

    def _between(self, start: int, place: int, ahead: Sequence[int]) -> list[int]:
        """The tokens from one place of the answer up to another."""
        missing = place - len(self._answer)
        if missing <= 0:
            return [*self._answer[start:place]]
        if missing > len(ahead):
            raise RuntimeError(f"of {missing} uncertain tokens, {len(ahead)} are known")
        return [*self._answer[start:], *ahead[len(ahead) - missing :]]

    def _read(self, tokens: list[int]) -> int:
        """Read tokens behind the certain ones for good; how many of them are allowed."""
        came, more = len(self._sampled), tokens[len(self._sampled) :]
        if more:
            seen = len(self._ahead)
            if more[:seen] == self._ahead:
                self._first = self._matcher
            else:
                self._matcher, seen = self._first, 0
            self._ahead = []
            came += seen + self._consume(more[seen:])
        settled = min(came, len(self._answer) - self._certain)
        self._sampled = tokens[settled:came]
        self._certain += settled
        return came

    def _look(self, tokens: list[int]) -> int:
        """Read tokens that may be taken back; how many of them are allowed."""
        seen = len(self._ahead)
        if tokens[:seen] != self._ahead:
            self._matcher, self._ahead, seen = self._first, [], 0
        if len(tokens) == seen:
            return seen
        if self._matcher is self._first:
            self._matcher = self._first.deep_copy()
        came = seen + self._consume(tokens[seen:])
        self._ahead = tokens[:came]
        return came

    def _consume(self, tokens: list[int]) -> int:
        taken = self._matcher.try_consume_tokens(tokens) if tokens else 0
        self._check()
        return taken

    def _check(self) -> None:
        if self._matcher.is_error():  # a mask would let ends come then
            reason = self._matcher.get_error().partition("\n")[0]
            raise RuntimeError(f"its constraint cannot be followed any more: {reason}")

    @contextmanager
    def _noted(self) -> Iterator[None]:
        if self.fault is not None:  # what the matcher has read is not known then
            raise self.fault
        try:
            yield
        except RuntimeError as error:
            self.fault = error
            raise
        except BaseException as error:  # a panic of the matcher is no Exception
            self.fault = RuntimeError(f"its constraint cannot be followed: {describe(error)}")
            raise self.fault from error


def empty_masks(rows: int, logits: mx.array) -> Words:
    """Masks for logits of shape (n, vocabulary) that let no token come."""
    return np.zeros((rows, (logits.shape[-1] + _WORD - 1) // _WORD), np.int32)


def fill_all(words: Words, states: Sequence[GrammarState | None]) -> None:
    """Set each row's bits by its state, in parallel; a row without one is free.

    What fails is told by the ``fault`` of a state, whose row lets no token come.
    """
    places = [(i, state) for i, state in enumerate(states) if state is not None]
    free = [i for i, state in enumerate(states) if state is None]
    words[free] = -1  # all bits
    together = [(i, s) for i, s in places if s.fault is None and not s._over]
    filled = _fill_together(words, together) if len(together) > 1 else []
    for i, state in places:
        try:
            if i in filled:
                with state._noted():
                    state._settle(words[i])
            else:
                state.fill(words[i])
        except BaseException:  # noqa: BLE001 - the border to the matcher: kept as its fault
            words[i] = 0


def _fill_together(words: Words, rows: Sequence[tuple[int, GrammarState]]) -> list[int]:
    """The rows that are filled: none if one of them makes that fail."""
    matchers = [(state._matcher, i) for i, state in rows]
    try:
        _executor().unsafe_compute_mask_ptr(
            matchers, words.ctypes.data, words.shape[1] * words.itemsize, len(words)
        )
    except BaseException:  # noqa: BLE001 - the border to the matchers: each is asked by itself
        return []
    return [i for i, _ in rows]


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor()


# Of each dtype of logits: an unsigned one of its size, and how infinity and its negative look.
_INFINITIES: dict[mx.Dtype, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    mx.float32: (np.uint32, 0x7F800000, 0xFF800000),
    mx.float16: (np.uint16, 0x7C00, 0xFC00),
    mx.bfloat16: (np.uint16, 0x7F80, 0xFF80),
}


@functools.cache
def _bounds(dtype: mx.Dtype) -> NDArray[Any]:
    """For each byte of a mask, the most that its eight logits may be: anything, or -inf."""
    kind, anything, nothing = _INFINITIES[dtype]
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, kind(anything), kind(nothing))


def masked(logits: mx.array, words: Words) -> mx.array:
    """Logits of shape (n, vocabulary), those of tokens -inf whose bits are not set.

    A minimum of numbers is what MLX's CPU back end has a fast loop for; a choice by booleans
    takes it eight times as long.
    """
    bounds = np.take(_bounds(logits.dtype), words.view(np.uint8), axis=0)
    bounds = bounds.reshape(len(words), -1)[:, : logits.shape[-1]]
    return mx.minimum(logits, mx.array(bounds).view(logits.dtype))
