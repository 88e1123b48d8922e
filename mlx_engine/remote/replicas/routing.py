"""Routing: a request goes to the replica that is likely to be done with its prompt first."""

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
_PREFIXES_PER_REPLICA = 1024


@dataclass(frozen=True, slots=True)
class PrefixHash:
    """The hash of a beginning of a prompt, and how many tokens that has, roughly."""

    digest: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class RequestCost:
    """The cost of a request, by which it is routed; a guess, made without a tokenizer.

    Attributes:
        prompt_tokens: in the prompt.
        answer_tokens: most that are generated.
        prefixes: of the first 1, 2, 4, 8, ... blocks of the prompt, shortest first.
    """

    prompt_tokens: int
    answer_tokens: int
    prefixes: tuple[PrefixHash, ...] = ()

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.answer_tokens

    @classmethod
    def of(cls, request: GenerationRequest) -> RequestCost:
        """The cost of ``request``."""
        limit = request.params.max_tokens
        answer = _DEFAULT_ANSWER if limit is None else limit
        source = request.source
        if isinstance(source, TextPrompt) and not isinstance(source.prompt, str):
            return cls(len(source.prompt), answer, _prefixes_of_tokens(source.prompt))
        text = _chat_text(source) if isinstance(source, ChatPrompt) else str(source.prompt)
        kind = b"chat" if isinstance(source, ChatPrompt) else b"text"
        return cls(len(text) // _CHARACTERS_PER_TOKEN, answer, _prefixes_of_text(text, kind))


@dataclass(slots=True)
class _ReplicaLoad:
    """The load of one replica, and the prefixes that it has seen."""

    outstanding: int = 0  # tokens of the requests that it has
    latest: int = 0  # when it was last chosen, by the count of choices
    prefixes: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # used last at the end

    def cached(self, cost: RequestCost) -> int:
        """Tokens of the prompt that it has seen before, roughly and at least."""
        seen = (prefix.tokens for prefix in cost.prefixes if prefix.digest in self.prefixes)
        return max(seen, default=0)

    def remember(self, cost: RequestCost) -> None:
        for prefix in cost.prefixes:
            self.prefixes[prefix.digest] = None
            self.prefixes.move_to_end(prefix.digest)
        while len(self.prefixes) > _PREFIXES_PER_REPLICA:
            self.prefixes.popitem(last=False)


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
        self._loads: dict[str, _ReplicaLoad] = {}
        self._choices = 0

    def join(self, name: str) -> None:
        """Let a replica take requests from now on; it has seen none."""
        self._loads[name] = _ReplicaLoad()

    def leave(self, name: str) -> None:
        """Let it take none any more; what it had seen is gone. No-op if it is not there."""
        self._loads.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._loads

    def outstanding(self, name: str) -> int:
        """Tokens of the requests that a replica has; 0 if it is not there."""
        return self._loads[name].outstanding if name in self._loads else 0

    def choose(self, cost: RequestCost, among: Collection[str] | None = None) -> str | None:
        """The replica that should do the request, which is outstanding there from now on.

        Args:
            among: names that may be chosen; ``None`` is all that are there.

        Returns:
            Its name; ``None`` if there is none.
        """
        names = [name for name in self._loads if among is None or name in among]
        if not names:
            return None

        def rank(name: str) -> tuple[int, int, int]:
            load = self._loads[name]
            return load.outstanding - load.cached(cost), load.outstanding, load.latest

        name = min(names, key=rank)
        load = self._loads[name]
        self._choices += 1
        load.latest = self._choices
        load.outstanding += cost.tokens
        load.remember(cost)
        return name

    def done(self, name: str, cost: RequestCost) -> None:
        """Let the request be outstanding there no more. No-op if the replica has left meanwhile."""
        if (load := self._loads.get(name)) is not None:
            load.outstanding = max(0, load.outstanding - cost.tokens)


def _chat_text(chat: ChatPrompt) -> str:
    """A text that two chats share as far as their prompts would; tools come first in most."""
    try:
        return json.dumps(
            [chat.tools, chat.messages], ensure_ascii=False, sort_keys=True, default=str
        )
    except (TypeError, ValueError, RecursionError):  # the engine will say what is wrong with it
        return ""


def _prefixes_of_text(text: str, kind: bytes) -> tuple[PrefixHash, ...]:
    size = _TOKENS_PER_BLOCK * _CHARACTERS_PER_TOKEN
    ends = _block_ends(len(text), size)
    pieces = [text[a:b].encode(errors="surrogatepass") for a, b in pairwise([0, *ends])]
    return _hashes(pieces, [end // _CHARACTERS_PER_TOKEN for end in ends], kind)


def _prefixes_of_tokens(tokens: list[int]) -> tuple[PrefixHash, ...]:
    ends = _block_ends(len(tokens), _TOKENS_PER_BLOCK)
    try:
        pieces = [array.array("Q", tokens[a:b]).tobytes() for a, b in pairwise([0, *ends])]
    except OverflowError:  # no vocabulary has such ids, as the engine will say
        return ()
    return _hashes(pieces, ends, b"ids")


def _block_ends(length: int, block: int) -> list[int]:
    """The ends of the first 1, 2, 4, ... blocks that ``length`` has."""
    return [block << power for power in range((length // block).bit_length())]


def _hashes(pieces: list[bytes], tokens: list[int], kind: bytes) -> tuple[PrefixHash, ...]:
    running = hashlib.blake2b(digest_size=16, person=kind)
    prefixes = []
    for piece, count in zip(pieces, tokens, strict=True):
        running.update(piece)
        prefixes.append(PrefixHash(running.copy().digest(), count))
    return tuple(prefixes)
