"""Which replica gets a request: the one that is likely to be done with its prompt first."""

from __future__ import annotations

import array
import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt

_CHARACTERS_PER_TOKEN = 4  # of English text, roughly; only a guess is needed
_TOKENS_PER_BLOCK = 64
_DEFAULT_ANSWER = 256  # tokens, where a request has no limit
_MARKS_PER_REPLICA = 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """A beginning of a prompt: its hash, and how many tokens it has, roughly."""

    digest: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a request is to whoever routes it; a guess, made without a tokenizer.

    Attributes:
        prompt_tokens: in the prompt.
        answer_tokens: most that are generated.
        marks: of the first 1, 2, 4, 8, ... blocks of the prompt, shortest first.
    """

    prompt_tokens: int
    answer_tokens: int
    marks: tuple[Mark, ...] = ()

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.answer_tokens

    @classmethod
    def of(cls, ask: GenerationRequest) -> Work:
        """Look at a request."""
        limit = ask.params.max_tokens
        answer = _DEFAULT_ANSWER if limit is None else limit
        source = ask.source
        if isinstance(source, TextPrompt) and not isinstance(source.prompt, str):
            return cls(len(source.prompt), answer, _marks_of_tokens(source.prompt))
        text = _chat_text(source) if isinstance(source, ChatPrompt) else str(source.prompt)
        kind = b"chat" if isinstance(source, ChatPrompt) else b"text"
        return cls(len(text) // _CHARACTERS_PER_TOKEN, answer, _marks_of_text(text, kind))


@dataclass(slots=True)
class _Seat:
    """What is known of one replica."""

    outstanding: int = 0  # tokens of the requests that it has
    latest: int = 0  # when it was last chosen, by the count of choices
    marks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # used last at the end

    def cached(self, work: Work) -> int:
        """Tokens of the prompt that it has seen before, roughly and at least."""
        return max((mark.tokens for mark in work.marks if mark.digest in self.marks), default=0)

    def remember(self, work: Work) -> None:
        for mark in work.marks:
            self.marks[mark.digest] = None
            self.marks.move_to_end(mark.digest)
        while len(self.marks) > _MARKS_PER_REPLICA:
            self.marks.popitem(last=False)


class Router:
    """Chooses among replicas by their names. Deterministic; for one thread at a time.

    A request goes where the tokens that are outstanding, and those of its own prompt that have
    to be prefilled there, are fewest together. So it goes to the replica that has seen the
    beginning of its prompt, unless the prefill that this saves is no more than the additional
    tokens that it would wait behind. Among equals the least loaded one is chosen, then the one
    that was chosen longest ago.

    A token to generate counts as much as one to prefill, though it takes longer: load weighs
    more than the prompt cache then, not less.
    """

    def __init__(self) -> None:
        self._seats: dict[str, _Seat] = {}
        self._choices = 0

    def join(self, name: str) -> None:
        """A replica takes requests from now on; it has seen none."""
        self._seats[name] = _Seat()

    def leave(self, name: str) -> None:
        """It takes none any more, and what it had seen is gone. No-op if it is not there."""
        self._seats.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._seats

    def outstanding(self, name: str) -> int:
        """Tokens of the requests that a replica has; 0 if it is not there."""
        return self._seats[name].outstanding if name in self._seats else 0

    def choose(self, work: Work, among: Collection[str] | None = None) -> str | None:
        """The replica that should do ``work``, which is outstanding there from now on.

        Args:
            among: names that may be chosen; ``None`` is all that are there.

        Returns:
            Its name; ``None`` if there is none.
        """
        names = [name for name in self._seats if among is None or name in among]
        if not names:
            return None

        def rank(name: str) -> tuple[int, int, int]:
            seat = self._seats[name]
            return seat.outstanding - seat.cached(work), seat.outstanding, seat.latest

        name = min(names, key=rank)
        seat = self._seats[name]
        self._choices += 1
        seat.latest = self._choices
        seat.outstanding += work.tokens
        seat.remember(work)
        return name

    def done(self, name: str, work: Work) -> None:
        """``work`` is outstanding there no more. No-op if the replica has left meanwhile."""
        if (seat := self._seats.get(name)) is not None:
            seat.outstanding = max(0, seat.outstanding - work.tokens)


def _chat_text(chat: ChatPrompt) -> str:
    """A text that two chats share as far as their prompts would; tools come first in most."""
    try:
        return json.dumps(
            [chat.tools, chat.messages], ensure_ascii=False, sort_keys=True, default=str
        )
    except (TypeError, ValueError, RecursionError):  # the engine will say what is wrong with it
        return ""


def _marks_of_text(text: str, kind: bytes) -> tuple[Mark, ...]:
    size = _TOKENS_PER_BLOCK * _CHARACTERS_PER_TOKEN
    ends = _block_ends(len(text), size)
    pieces = [text[a:b].encode(errors="surrogatepass") for a, b in pairwise([0, *ends])]
    return _marks(pieces, [end // _CHARACTERS_PER_TOKEN for end in ends], kind)


def _marks_of_tokens(tokens: list[int]) -> tuple[Mark, ...]:
    ends = _block_ends(len(tokens), _TOKENS_PER_BLOCK)
    try:
        pieces = [array.array("Q", tokens[a:b]).tobytes() for a, b in pairwise([0, *ends])]
    except OverflowError:  # no vocabulary has such ids, as the engine will say
        return ()
    return _marks(pieces, ends, b"ids")


def _block_ends(length: int, block: int) -> list[int]:
    """Where the first 1, 2, 4, ... blocks end that ``length`` has."""
    return [block << power for power in range((length // block).bit_length())]


def _marks(pieces: list[bytes], tokens: list[int], kind: bytes) -> tuple[Mark, ...]:
    running = hashlib.blake2b(digest_size=16, person=kind)
    marks = []
    for piece, count in zip(pieces, tokens, strict=True):
        running.update(piece)
        marks.append(Mark(running.copy().digest(), count))
    return tuple(marks)
