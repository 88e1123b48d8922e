"""Places in a chat's prompt where its turns begin and end: worth keeping for the next one.

A KV cache that cannot be cut back (recurrent state, sliding windows) is reused only where it was
stored. The next turn of a conversation differs from this one's prompt from the generation prompt
on, or from an answer whose reasoning the template drops by then; a conversation of somebody else
differs from the end of the system message and the tools on.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.conversation import LEADING
from mlx_engine.core.stop import Interrupted

_MARK = "heron95"  # what a user says where only what comes before it matters
_HEADS = 32  # beginnings that are remembered for each tokenizer
_HEAD_CHARACTERS = 2**22  # of all of them
_TURNS = 512  # ends of users' turns that are remembered for each tokenizer

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]  # without a generation prompt


class EncodedText:
    """A text's tokens, and which of them are before a character. Any thread.

    Attributes:
        tokens: token ids.
    """

    def __init__(self, tokenizer: TokenizerWrapper, text: str) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._found: Any = None
        encode = tokenizer.encode
        # A tokenizer with an encode() of its own may change the text before.
        if tokenizer.is_fast and encode.__module__.startswith("transformers."):
            self._found = encode.__self__(text, add_special_tokens=False)
            self.tokens: list[int] = self._found["input_ids"]
        else:
            self.tokens = encode(text, add_special_tokens=False)

    def before(self, index: int) -> int:
        """Tokens that end before the character at ``index``, or with the one before it."""
        if index <= 0:
            return 0
        if index >= len(self._text):
            return len(self.tokens)
        if self._found is not None:
            return next(
                (
                    token
                    for at in range(index, min(index + 8, len(self._text)))
                    if (token := self._found.char_to_token(at)) is not None
                ),
                0,
            )
        if 2 * index < len(self._text):
            ours = self._tokens(self._text[:index])
            return _common(ours, self.tokens)
        ours = self._tokens(self._text[index:])
        same = _common(ours[::-1], self.tokens[::-1])
        # One that is not the same has characters of both sides.
        return max(0, len(self.tokens) - same - (same < len(ours)))

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


@dataclass(slots=True)
class _Memory:
    """Heads and turns of one tokenizer's chats."""

    heads: OrderedDict[bytes, str] = field(default_factory=OrderedDict)
    turns: OrderedDict[bytes, tuple[int, ...]] = field(default_factory=OrderedDict)
    characters: int = 0

    def add_head(self, key: bytes, head: str) -> None:
        self.heads[key] = head
        self.characters += len(head)
        while len(self.heads) > _HEADS or self.characters > _HEAD_CHARACTERS:
            self.characters -= len(self.heads.popitem(last=False)[1])

    def add_turn(self, key: bytes, places: tuple[int, ...]) -> None:
        self.turns[key] = places
        self.turns.move_to_end(key)
        while len(self.turns) > _TURNS:
            self.turns.popitem(last=False)


_memories: WeakKeyDictionary[TokenizerWrapper, _Memory] = WeakKeyDictionary()
_lock = threading.Lock()  # around all use of them; never while a template is at work


class ChatPlaces:
    """The places of one chat. Any thread; costs nothing but the place if it cannot.

    Args:
        messages: as templates expect them.
        tools, options: of the chat; what the template is given.
        render: puts messages into the template; may raise anything.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        messages: Messages,
        tools: object,
        options: object,
        render: Render,
    ) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = tools
        self._options = options
        self._render = render

    def head(self) -> str:
        """The beginning of all chats with the same system messages and tools.

        That is the text up to where the first user's text begins; empty if it cannot be known. It
        is rendered when they come for the first time.
        """
        count = next(
            (n for n, each in enumerate(self._messages) if each.get("role") not in LEADING),
            len(self._messages),
        )
        if not count and not self._tools:
            return ""
        leading = self._messages[:count]
        key = self._key(leading)
        with _lock:
            memory = _memories.setdefault(self._tokenizer, _Memory())
            if key in memory.heads:
                memory.heads.move_to_end(key)
                return memory.heads[key]
        head = self._make_head(leading)
        with _lock:
            if key not in memory.heads:
                memory.add_head(key, head)
        return head

    def find(self, text: str, end: int | None, encoded: EncodedText) -> tuple[int, ...]:
        """Numbers of tokens after which the prompt's cache is worth keeping, ascending.

        Args:
            text: the prompt.
            end: characters before its generation prompt; ``None`` if that is not known.
            encoded: the prompt in tokens.
        """
        places = {encoded.before(_common(self.head(), text))}
        if end is None:
            without = self._attempt(self._messages)
            end = None if without is None else _common(without, text)
        ends = () if end is None else self._ends(text, end, encoded)
        places.update(ends, self._last_turn(text, ends, encoded))
        return tuple(sorted(place for place in places if 0 < place < len(encoded.tokens)))

    def _make_head(self, leading: Messages) -> str:
        text = self._attempt([*leading, {"role": "user", "content": _MARK}])
        return "" if text is None else text[: max(0, text.rfind(_MARK))]

    def _attempt(self, messages: Messages) -> str | None:
        try:
            return self._render(messages)
        except Interrupted:
            raise
        except Exception:  # noqa: BLE001 - a template raises anything
            return None

    def _ends(self, text: str, end: int, encoded: EncodedText) -> tuple[int, ...]:
        """The end of the last message, and of what a past answer has of the generation prompt.

        A past answer may come without the marker that opens reasoning.
        """
        opened = -1
        if self._tokenizer.has_thinking:
            opened = text.find(self._tokenizer.think_start, end)
        last = len(encoded.tokens) - 1 if opened < 0 else encoded.before(opened)
        return encoded.before(end), last

    def _last_turn(self, text: str, ends: tuple[int, ...], encoded: EncodedText) -> tuple[int, ...]:
        """The place where the last user's message ended, before calls of tools and their results.

        Templates drop the reasoning after it when the next one comes. A conversation has been
        here when that message was its last one; if not, that prompt is rendered, once.
        """
        roles = [message.get("role") for message in self._messages]
        if "user" not in roles:
            return ()
        until = len(roles) - roles[::-1].index("user")
        key = self._key(self._messages[:until])
        with _lock:
            memory = _memories.setdefault(self._tokenizer, _Memory())
            known = ends if until == len(roles) else memory.turns.get(key)
            if known is not None:
                memory.add_turn(key, known)
                return known
        turn = self._attempt(self._messages[:until])
        known = () if turn is None else (encoded.before(_common(turn, text)),)
        with _lock:
            memory.add_turn(key, known)
        return known

    def _key(self, messages: Messages) -> bytes:
        given = json.dumps([messages, self._tools, self._options], default=repr)
        return hashlib.blake2b(given.encode(errors="replace"), digest_size=16).digest()


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Items that two sequences have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # those up to low are the same, those up to high are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
