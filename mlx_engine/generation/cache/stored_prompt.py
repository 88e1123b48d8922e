"""A stored prompt, the places to which its KV cache can be taken back, and an index of many."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.snapshot import (
    State,
    arrays,
    cut_to,
    snapshot,
    state_arrays,
    state_beside,
)

Tokens = npt.NDArray[np.int32]

SMALLEST_HIT = 16  # tokens; prefilling fewer costs less than copying them
_FIRST_BLOCK = 64  # tokens compared before the rest: most prompts that differ do so early
_OLD_PLACES = 8  # of earlier turns, kept for a conversation that goes on from one of them


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A place within a stored prompt, by the layers that cannot be cut back to it.

    Attributes:
        tokens: how many of the prompt's first tokens are before it.
        state: what those layers held there; the others are cut back.
        nbytes: memory that it holds.
    """

    tokens: int
    state: State
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A stored prompt; nothing in it is ever written to.

    Attributes:
        tokens: what the cache holds, of shape (tokens,).
        cache: their keys and values, or state.
        prefilled: how many of them prefill chunks computed, not decode steps.
        own_nbytes: memory that it holds, its marks not counted.
        trimmable: whether it can be cut back.
        first: the smallest number of its tokens that can be reused, but for its marks.
        last: the largest.
        marks: places before ``first`` that can be used too, ascending.
        turn: where the last turn of the chat that it is of ended, in tokens; 0 is not known.
    """

    tokens: Tokens
    cache: Cache
    prefilled: int
    own_nbytes: int
    trimmable: bool
    first: int
    last: int
    marks: tuple[Mark, ...] = ()
    turn: int = 0

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.own_nbytes + sum(mark.nbytes for mark in self.marks)

    @property
    def places(self) -> list[int]:
        """Numbers of tokens at which it can be used if it cannot be cut back, ascending."""
        return [*(mark.tokens for mark in self.marks), self.last]

    def usable(self, common: int, grid: int) -> int:
        """Tokens that a prompt with ``common`` first tokens can take from it, or 0."""
        return usable(common, grid, self.first, self.last, (m.tokens for m in self.marks))

    def covers(self, tokens: Tokens, last: int) -> bool:
        """Whether it begins with ``tokens``, and is usable up to ``last`` of them."""
        return (
            len(self.tokens) >= len(tokens)
            and self.last >= last
            and common_prefix(self.tokens, tokens) == len(tokens)
        )

    def taken(self, tokens: int) -> Cache:
        """A cache of that many of its tokens, which are usable; it may be written into."""
        for mark in self.marks:
            if mark.tokens == tokens:
                return cut_to(self.cache, mark.state, tokens)
        return snapshot(self.cache, tokens if self.trimmable else None)

    def mark_in(self, tokens: int, longer: Cache) -> Mark:
        """A place of it, as a mark of a prompt that begins with the same tokens."""
        return Mark(tokens, *state_beside(self.taken(tokens), longer))

    def marked(self, cache: Cache, tokens: int) -> Entry:
        """The same with one more place, by a cache that has not gone further."""
        mark = Mark(tokens, *state_beside(cache, self.cache))
        marks = sorted([*self.marks, mark], key=lambda mark: mark.tokens)
        return replace(self, marks=tuple(marks))

    def thinned(self, keep: Collection[int], limit: int) -> Entry:
        """The same without places that are too many, or more than memory allows.

        Of two, the one goes of which fewer tokens would have to be prefilled again. Those of
        ``keep`` are kept as long as there is memory, the first of them longest.

        Args:
            keep: the places of the chat as it is now; nothing is too many if it is empty.
            limit: bytes for all of it.
        """
        marks = list(self.marks)
        old = [mark for mark in marks if mark.tokens not in keep]
        while keep and (len(old) > _OLD_PLACES or sum(m.nbytes for m in old) > limit // 8):
            _drop_cheapest(marks, old)
        rest = [mark for mark in marks if mark not in old][1:]
        for droppable in (old, rest, marks):
            while droppable and self.own_nbytes + sum(m.nbytes for m in marks) > limit:
                _drop_cheapest(marks, droppable)
        return replace(self, marks=tuple(marks))

    def evaluate(self) -> None:
        """Compute what it holds: an unevaluated slice keeps all that it was computed from."""
        mx.eval(arrays(self.cache), [state_arrays(mark.state) for mark in self.marks])


def _drop_cheapest(marks: list[Mark], droppable: list[Mark]) -> None:
    """Drop the one of ``droppable`` that is least far behind the one before it."""

    def distance(mark: Mark) -> int:
        index = marks.index(mark)
        return mark.tokens - (marks[index - 1].tokens if index else 0)

    cheapest = min(droppable, key=distance)
    marks.remove(cheapest)
    if droppable is not marks:
        droppable.remove(cheapest)


def usable(common: int, grid: int, first: int, last: int, marks: Iterable[int]) -> int:
    """Tokens that a prompt with ``common`` first tokens can take from an entry, or 0.

    Args:
        grid, first, last, marks: of the cache and of the entry; see ``Entry``.
    """
    cut = min(common, last) // grid * grid
    if cut < first:
        cut = max((mark for mark in marks if mark <= common), default=0)
    return cut if cut >= SMALLEST_HIT else 0


def common_prefix(one: Sequence[int] | Tokens, other: Sequence[int] | Tokens) -> int:
    """How many tokens two prompts have in common at their beginning."""
    a, b = np.asarray(one, dtype=np.int32), np.asarray(other, dtype=np.int32)
    end = min(len(a), len(b))
    start = 0
    for stop in (min(_FIRST_BLOCK, end), end):
        differs = a[start:stop] != b[start:stop]
        if differs.any():
            return start + int(differs.argmax())
        start = stop
    return end


@dataclass(frozen=True, slots=True, eq=False)
class _Outline:
    """A stored prompt without its KV cache; the attributes are those of ``Entry``."""

    tokens: Tokens
    first: int
    last: int
    marks: tuple[int, ...]


class PromptIndex:
    """Index of the prompts in a prompt cache, which keeps it. It holds no arrays of MLX's.

    Args:
        step: multiples of so many tokens can be reused.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._lock = threading.Lock()
        self._outlines: dict[int, _Outline] = {}

    def put(self, key: int, entry: Entry) -> None:
        """Have an entry under this key, in the place of another one if there was one."""
        marks = tuple(mark.tokens for mark in entry.marks)
        outline = _Outline(entry.tokens, entry.first, entry.last, marks)
        with self._lock:
            self._outlines[key] = outline

    def drop(self, key: int) -> None:
        """Have it no more."""
        with self._lock:
            del self._outlines[key]

    def clear(self) -> None:
        """Have none any more."""
        with self._lock:
            self._outlines.clear()

    def cached(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens of a prompt ``PromptCache.fetch`` would give now."""
        with self._lock:
            outlines = tuple(self._outlines.values())
        prompt = np.array(tokens, dtype=np.int32)
        end = max(len(prompt) - 1, 0)
        found = 0
        for one in outlines:
            common = min(common_prefix(one.tokens, prompt), end)
            found = max(found, usable(common, self._step, one.first, one.last, one.marks))
        return found
