"""Bounds on reasoning: one that has used its tokens up is closed, and the answer goes on.

    tokens of the answer ─► _Reading ─► state: is reasoning open, how many tokens has it used,
                                        which tokens are forced now

The state is a function of the tokens alone. Those that are certain are read once, as they come;
those that lie ahead of them, the token that is being computed or proposals of a draft, are looked
at only where they can matter, and taken back if they turn out to be others.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.models.detokenizer import make_detokenizer

_ANCHOR = "a"  # a text in which no tokenizer sees the beginning or the end of one


class ReasoningReader(Protocol):
    """A reader of one answer's text, which tells where reasoning is."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside of reasoning."""

    @property
    def reasoning_over(self) -> bool:
        """Whether no reasoning can come any more."""

    def feed(self, text: str) -> object:
        """Read on."""


class ReasoningClose:
    """The tokens of what closes reasoning, behind any text. From any thread.

    Args:
        tokenizer: of the model.
        text: the family's own, such as a line break and ``</think>``.
    """

    def __init__(self, tokenizer: TokenizerWrapper, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._added: Mapping[int, object] = getattr(tokenizer, "added_tokens_decoder", {})
        exact = self._encode(text)
        self.tokens = exact if exact is not None else self._plain(text)
        self._ends = self._lengths(self.tokens) if exact is not None else []

    def behind(self, before: str) -> tuple[int, ...]:
        """The tokens that close reasoning whose text ends like ``before``.

        What is there already of the closing text is not said twice, so that a line break, or
        a marker of several tokens that the model has begun, is completed. A marker that is one
        token is not: a model takes its letters for text, and goes on reasoning.
        """
        space = len(self.text) - len(self.text.lstrip())
        for size in range(len(self.text) - 1, 0, -1) if self._ends else ():
            if not before.endswith(self.text[space if size > space else 0 : size]):
                continue
            place = bisect_right(self._ends, size)
            if place and self._ends[place - 1] == size:
                return self.tokens[place:]
            if self.tokens[place] not in self._added:
                rest = self._encode(self.text[size:])
                if rest is not None:
                    return rest
        if before.endswith("`") and not space:  # or it may be taken for a marker that is quoted
            return self._encode("\n" + self.text) or self.tokens
        return self.tokens

    def _encode(self, text: str) -> tuple[int, ...] | None:
        """Tokens that continue a text by this one, to the letter; ``None`` if none are found."""
        for encode in (self._plain, self._inside, self._in_parts):
            tokens = encode(text)
            if tokens and self._decode(tokens)[-1] == text:
                return tokens
        return None

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _inside(self, text: str) -> tuple[int, ...]:
        """As in the middle of a text: some tokenizers begin one with a space."""
        return self._plain(_ANCHOR + text)[len(self._plain(_ANCHOR)) :]

    def _in_parts(self, text: str) -> tuple[int, ...]:
        """With added tokens by themselves: some tokenizers have a space behind each."""
        ids = {str(each): token for token, each in self._added.items()}
        names = sorted((re.escape(name) for name in ids if name and name in text), reverse=True)
        parts = re.split(f"({'|'.join(names)})", text) if names else [text]
        each = ((ids[part],) if part in ids else self._inside(part) for part in parts if part)
        return tuple(itertools.chain.from_iterable(each))

    def _decode(self, tokens: Sequence[int]) -> list[str]:
        """The text behind the anchor after each of the tokens."""
        detokenizer = make_detokenizer(self._tokenizer)
        text = "".join(map(detokenizer.add, self._plain(_ANCHOR)))
        start, texts = len(text + detokenizer.preview()), []
        for token in tokens:
            text += detokenizer.add(token)
            texts.append((text + detokenizer.preview())[start:])
        return texts

    def _lengths(self, tokens: Sequence[int]) -> list[int]:
        return [len(text) for text in self._decode(tokens)]


@dataclass(frozen=True, slots=True)
class _State:
    """Where an answer is after so many of its tokens.

    Attributes:
        open: whether reasoning is.
        used: tokens that came while it was.
        forced: tokens that must come now, one after another.
        armed: whether reasoning has been closed since tokens were forced last, so that it can
            be closed again.
        over: whether nothing will be forced any more.
    """

    open: bool
    used: int = 0
    forced: tuple[int, ...] = ()
    armed: bool = True
    over: bool = False


class _Reading:
    """One way of an answer, token by token."""

    def __init__(
        self,
        limit: int,
        close: ReasoningClose,
        tokenizer: TokenizerWrapper,
        make_reader: Callable[[], ReasoningReader],
        whole_characters: bool,
    ) -> None:
        self._limit = limit
        self._whole_characters = whole_characters
        self._close = close
        self._make_reader = make_reader
        self._reader = make_reader()
        self._detokenizer = make_detokenizer(tokenizer)
        self._texts: list[str] = []
        self.state = self._decided(_State(self._reader.in_reasoning))

    def add(self, token: int) -> _State:
        """The state with one more token."""
        text = self._detokenizer.add(token)
        if text:
            self._texts.append(text)
            self._reader.feed(text)
        before, is_open = self.state, self._reader.in_reasoning
        after = _State(
            open=is_open,
            used=before.used + before.open,
            forced=before.forced[1:],
            armed=before.armed or not is_open,
        )
        self.state = self._decided(after)
        return self.state

    def skip(self, tokens: Sequence[int], state: _State) -> None:
        """Begin behind these tokens, where this is the state."""
        text = "".join(map(self._detokenizer.add, tokens))
        self._texts.append(text)
        self._reader.feed(text)
        self.state = state

    def _decided(self, state: _State) -> _State:
        if state.forced:
            return state
        if state.open and state.armed and state.used >= self._limit:
            held = self._detokenizer.preview()  # it may have closed reasoning already
            if self._whole_characters and held.endswith("\ufffd"):
                return state
            if not held or self._open_behind(held):
                longest = len(self._close.text)
                before = "".join(self._texts[-longest:]) + held
                return replace(state, forced=self._close.behind(before), armed=False)
        return replace(state, over=self._reader.reasoning_over)

    def _open_behind(self, held: str) -> bool:
        reader = self._make_reader()
        reader.feed("".join(self._texts) + held)
        return reader.in_reasoning


class ReasoningBudget:
    """The tokens that one request's reasoning may use.

    Made on any thread; asked on the MLX thread, at any place of the answer, in any order.

    Args:
        limit: tokens that may come while reasoning is open.
        close: what closes it.
        tokenizer: of the model.
        make_reader: gives what reads the answer, from its beginning.
        answer: its tokens that are certain; the list grows.
        whole_characters: whether a character that has begun is completed before.

    Attributes:
        fault: what the tokenizer or the reader has raised; ``None`` where MLX has.
    """

    fault: BaseException | None = None

    def __init__(
        self,
        limit: int,
        close: ReasoningClose,
        tokenizer: TokenizerWrapper,
        make_reader: Callable[[], ReasoningReader],
        answer: Sequence[int],
        *,
        whole_characters: bool = False,
    ) -> None:
        self._limit = limit
        self._answer = answer
        self._begin = partial(_Reading, limit, close, tokenizer, make_reader, whole_characters)
        self._reading: _Reading | None = self._begin()  # ``None`` when nothing can come any more
        self._certain = 0  # tokens of the answer that have been read
        self._ahead: list[int] = []  # those behind them that have been read, and may be others
        self._states = [self._reading.state]  # behind the certain ones, and each of ``ahead``

    def forced(
        self, place: int, ahead: Sequence[mx.array], logits: mx.array, later: int = 0
    ) -> int | None:
        """The token that alone may come at a place of the answer; ``None`` if any may.

        Args:
            place: number of the token, counted from 0.
            ahead: tokens before it, at least those that are not certain yet; they are read, and
                waited for, only where they can matter.
            logits: computed meanwhile.
            later: how many at the end of ``ahead`` come at that place or behind it.

        Raises:
            Exception: MLX failed; or what ``fault`` then is.
        """
        if self._reading is None:
            return None
        if self.fault is not None:  # what has been read is not known then
            raise self.fault
        self._read_certain(self._reading)
        state, count = self._states[0], place - self._certain
        if state.over:
            self._reading = None
            return None
        if count < len(state.forced):
            return state.forced[count]  # where another one was proposed, nothing is used
        if not count or (not state.forced and count < self._limit - state.used):
            return None
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        tokens = [token for each in ahead for token in cast("list[int]", each.tolist())]
        end = len(tokens) - later
        if end < count:
            raise RuntimeError(f"of {count} tokens that are not certain, {end} are known")
        self._read_ahead(self._reading, tokens[end - count : end])
        found = self._states[count].forced
        return found[0] if found else None

    def apply(self, logits: mx.array, place: int, ahead: Sequence[mx.array]) -> mx.array:
        """Logits of shape (n, vocabulary) with nothing left but the forced token, where one is.

        Args:
            place: of the first of them.
            ahead: tokens before the last of them, as of ``forced``.
        """
        rows = range(logits.shape[0])
        tokens = [self.forced(place + i, ahead, logits, rows[-1] - i) for i in rows]
        return only(tokens, logits)

    def _read_certain(self, reading: _Reading) -> None:
        for token in self._answer[self._certain :]:
            if self._ahead and self._ahead[0] != token:
                reading = self._read_again()
            if self._ahead:
                del self._ahead[0], self._states[0]
            else:
                with self._noted():
                    self._states = [reading.add(token)]
            self._certain += 1

    def _read_ahead(self, reading: _Reading, tokens: list[int]) -> None:
        known = self._ahead[: len(tokens)]
        if known != tokens[: len(known)]:
            reading = self._read_again()
        for token in tokens[len(self._ahead) :]:
            with self._noted():
                self._states.append(reading.add(token))
            self._ahead.append(token)

    def _read_again(self) -> _Reading:
        """Go back to what is certain."""
        self._ahead, self._states = [], self._states[:1]
        with self._noted():
            reading = self._reading = self._begin()
            reading.skip(self._answer[: self._certain], self._states[0])
        return reading

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.fault = error
            raise


def only(tokens: Sequence[int | None], logits: mx.array) -> mx.array:
    """Logits of shape (n, vocabulary) with nothing left but a row's token, where it has one.

    Its own logit stays, lest one that is no number is hidden, unless it was excluded.
    """
    if all(token is None for token in tokens):
        return logits
    rows: list[mx.array] = []
    for i, token in enumerate(tokens):
        row = logits[i : i + 1]
        if token is not None:
            own = row[:, token : token + 1]
            own = mx.where(own == -mx.inf, mx.zeros_like(own), own)
            kept = mx.arange(row.shape[-1]) == token
            row = mx.where(kept, own, mx.array(-mx.inf, row.dtype))
        rows.append(row)
    return mx.concatenate(rows)
