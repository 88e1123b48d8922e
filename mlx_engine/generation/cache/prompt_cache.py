"""KV caches of prompts that were seen before, so that only what is new is prefilled."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_engine.cache_stats import PromptCacheLookup, PromptCacheStats
from mlx_engine.generation.cache.kv_cache import Cache
from mlx_engine.generation.cache.lookup import explain
from mlx_engine.generation.cache.snapshot import (
    has_dropped,
    is_quantized,
    length,
    packed,
    trimmable,
)
from mlx_engine.generation.cache.stored_prompt import (
    SMALLEST_HIT,
    Entry,
    Mark,
    PromptIndex,
    Tokens,
    common_prefix,
)

_clock = itertools.count(1)  # ticks whenever a stored prompt of any engine is used


@dataclass(frozen=True, slots=True)
class Hit:
    """The beginning of a prompt, as far as it was stored.

    Attributes:
        cache: holds exactly the first ``cached`` tokens, and may be written into; ``None``
            on a miss.
        cached: tokens in it, 0 on a miss; at most all but the prompt's last one, with which
            decoding starts.
        checkpoint: a number of tokens at which prefill should stop and ``store`` its cache:
            other prompts begin with these tokens too, and this model's cache cannot be cut
            back to them later. ``None`` if there is no such place.
    """

    cache: Cache | None
    cached: int
    checkpoint: int | None


class PromptCache:
    """Stored prompts of one model. It lives on the MLX thread, all but ``stats()`` and ``index``.

    The longest stored beginning of a prompt is reused, whichever prompt it comes from. A cache
    that cannot be cut back is reused at the places where it was stored; they move to the prompt
    that was stored last of those that have them. When the limit is reached, what was used least
    recently goes.

    Args:
        limit: bytes that all entries may hold together; 0 stores nothing.
        grid: tokens in a prefill chunk, where results depend on where chunks begin (a
            quantised or bounded KV cache): only whole chunks are reused then, so that
            results stay those of a run without the prompt cache.
        quantized_from: the engine's ``quantized_kv_start``, if its KV cache is quantised.

    Attributes:
        index: their tokens, for other threads.
        room: bytes that it may come to now, besides ``limit``; ``None`` is any number.
        claim: called with the bytes that all entries are to take, before they become more, which
            it may refuse, and after each change.
    """

    def __init__(self, limit: int, *, grid: int | None = None, quantized_from: int = 0) -> None:
        self.grid = grid
        self.quantized_from = quantized_from
        self._limit = limit
        self._step = grid or 1
        self.index = PromptIndex(self._step)
        self.room: Callable[[], int | None] = _endless
        self.claim: Callable[[int], bool] = _anything
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # least recently used first
        self._used: dict[int, int] = {}  # when, by the clock
        self._next_key = 0
        # Counted here, so that stats() on another thread never walks what this one changes.
        self._nbytes = 0
        self._hits = self._misses = self._hit_tokens = 0
        self._stored = self._evicted = self._refused = 0
        self._last_lookup: PromptCacheLookup | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that all entries hold."""
        return self._nbytes

    @property
    def limit(self) -> int:
        """Bytes that they may hold."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self.shrink(limit)

    def __len__(self) -> int:
        return len(self._entries)

    def oldest(self) -> int | None:
        """When the entry was used that would go first, by the clock of all prompt caches."""
        first = next(iter(self._entries), None)
        return None if first is None else self._used[first]

    def entries(self) -> list[Entry]:
        """Everything stored, least recently used first."""
        return list(self._entries.values())

    def outlines(self) -> list[tuple[int, Tokens]]:
        """Key and tokens of everything stored, least recently used first."""
        return [(key, entry.tokens) for key, entry in self._entries.items()]

    def heir(self, key: int, tokens: Tokens) -> tuple[int, Entry | None]:
        """The entry that had a key and tokens in ``outlines``, or one that goes on from there.

        Returns:
            Its key and the entry; ``None`` if it was evicted.
        """
        if (entry := self._entries.get(key)) is not None:
            return key, entry
        for other, entry in self._entries.items():
            if entry.covers(tokens, 0):
                return other, entry
        return key, None

    def stats(self) -> PromptCacheStats:
        """Counters and the latest lookup. From any thread."""
        return PromptCacheStats(
            entries=len(self._entries),
            nbytes=self._nbytes,
            limit=self._limit,
            hits=self._hits,
            misses=self._misses,
            hit_tokens=self._hit_tokens,
            stored=self._stored,
            evicted=self._evicted,
            refused=self._refused,
            last_lookup=self._last_lookup,
        )

    def fetch(self, tokens: Sequence[int], request_id: str = "", *, counted: bool = True) -> Hit:
        """The longest beginning of ``tokens`` that is stored, as a cache to write into.

        Args:
            request_id: for ``stats``.
            counted: whether ``stats`` tells of it.
        """
        prompt = np.array(tokens, dtype=np.int32)
        end = max(len(prompt) - 1, 0)
        used: int | None = None
        closest: Entry | None = None
        cached = shared = most = 0
        for key, entry in self._entries.items():  # of equals, the latest
            common = common_prefix(entry.tokens, prompt)
            usable = entry.usable(min(common, end), self._step)
            if usable and usable >= cached:
                used, cached = key, usable
            if not entry.trimmable:
                shared = max(shared, min(common, end) // self._step * self._step)
            if common >= most:
                closest, most = entry, common
        cache: Cache | None = None
        if used is not None:
            self._touch(used)
            entry = self._entries[used]
            cache = entry.taken(cached)
        if counted:
            self._misses += used is None
            self._hits += used is not None
            self._hit_tokens += cached
            self._last_lookup = explain(request_id, prompt, cached, closest, most, self.grid)
        return Hit(cache, cached, shared if shared - cached >= SMALLEST_HIT else None)

    def store(
        self,
        tokens: Sequence[int],
        cache: Cache,
        *,
        prefilled: int | None = None,
        places: Collection[int] = (),
        marks: Sequence[Mark] = (),
    ) -> bool:
        """Keep what ``cache`` holds of ``tokens``; it may be written into afterwards.

        A cache that cannot be cut back is kept at this place. Keys and values of layers that
        can be cut back are held once for all places of a conversation.

        Args:
            tokens: what was put into ``cache``, from the beginning. It may have more
                than that in it if it can be cut back, or less.
            prefilled: how many of them prefill chunks computed, each beginning at a multiple
                of ``grid``; ``None`` is all of them.
            places: where the turns of a chat begin and end; of other places in it only a few
                are kept.
            marks: places that are known already.

        Returns:
            Whether they can be fetched now.
        """
        held = length(cache)
        size = len(tokens) if held is None else min(held, len(tokens))
        if self._limit == 0 or size == 0:
            return False
        can_trim = trimmable(cache)
        prefilled = size if prefilled is None else min(prefilled, size)
        first, last = self._reach(cache, size, prefilled, can_trim)
        cuttable = can_trim or held is None or held == size
        if not cuttable or last < max(first, SMALLEST_HIT):
            self._refused += 1
            return False
        ids = np.array(tokens[:size], dtype=np.int32)
        shared = not can_trim and self.grid is None  # with others' keys and values
        for key, entry in self._entries.items():
            if not entry.covers(ids, last):
                continue
            if entry.first <= first or last in entry.places:
                self._touch(key)
                return True
            if shared and not entry.trimmable:
                return self._mark(key, cache, last, places)
        kept, nbytes = packed(cache, size if can_trim else None)
        if not 0 < nbytes <= self._limit:
            self._refused += 1
            return False
        turn = max(places, default=0) if shared else 0
        new = Entry(ids, kept, prefilled, nbytes, can_trim, first, last, tuple(marks), turn)
        if shared:
            new = self._take_over(new, places)
        for key, entry in list(self._entries.items()):
            if new.first <= entry.first and new.covers(entry.tokens, entry.last):
                self._drop(key)
        if not self._make_room(new.nbytes, new.nbytes):
            return False
        new.evaluate()
        self._entries[self._next_key] = new
        self._touch(self._next_key)
        self.index.put(self._next_key, new)
        self._next_key += 1
        self._change(new.nbytes)
        self._stored += 1
        return True

    def _mark(self, key: int, cache: Cache, place: int, places: Collection[int]) -> bool:
        """Add a place to an entry that goes further than ``cache``."""
        keep = {place, *places} if places else ()
        marked = self._entries[key].marked(cache, place).thinned(keep, self._limit)
        if marked.nbytes > self._limit:
            self._refused += 1
            return False
        self._touch(key)
        if not self._make_room(marked.nbytes, marked.nbytes - self._entries[key].nbytes):
            return False
        marked.evaluate()
        self._replace(key, marked)
        self._stored += 1
        return True

    def shrink(self, limit: int) -> None:
        """Drop what was used least recently until ``nbytes`` is at most ``limit``."""
        while self._nbytes > limit and self._entries:
            self.evict()

    def evict(self) -> None:
        """Drop what was used least recently, if there is anything."""
        if self._entries:
            self._drop(next(iter(self._entries)))
            self._evicted += 1

    def clear(self) -> None:
        """Drop everything; counters stay."""
        self._entries.clear()
        self._used.clear()
        self.index.clear()
        self._change(-self._nbytes)

    def _make_room(self, whole: int, more: int) -> bool:
        """Drop what was used least recently until an entry fits; whether there is room for it.

        Args:
            whole: its bytes; nothing is dropped for what is too much by itself.
            more: bytes that come with it.
        """
        room = self.room()
        most = self._limit if room is None else min(self._limit, room)
        if whole <= most:
            self.shrink(most - more)
        if whole <= most and self.claim(self._nbytes + more):
            return True
        self._refused += 1
        return False

    def _touch(self, key: int) -> None:
        """An entry is used now."""
        self._entries.move_to_end(key)
        self._used[key] = next(_clock)

    def _change(self, nbytes: int) -> None:
        """Have so many bytes more, or less."""
        self._nbytes += nbytes
        self.claim(self._nbytes)

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        del self._used[key]
        self.index.drop(key)
        self._change(-entry.nbytes)

    def _reach(self, cache: Cache, size: int, prefilled: int, can_trim: bool) -> tuple[int, int]:
        """The fewest and the most of its first ``size`` tokens that can be reused exactly.

        A cold run quantises after the first chunk that ends at or beyond ``quantized_from``.
        So what it has after whole chunks, at a multiple of ``grid``, is quantised if that is
        at least ``quantized_from``, and is not if it is less; an entry can stand in only
        where it is of the same kind. Tokens before were computed in full precision in both.
        """
        first, last = 0 if can_trim else size, size
        if self.grid is not None:
            if has_dropped(cache):  # what it dropped, and when, depends on how it was filled
                return size, 0
            last = prefilled
            if is_quantized(cache):
                first = max(first, self.quantized_from)
            elif self.quantized_from:
                last = min(last, self.quantized_from - 1)
        return first, last // self._step * self._step

    def _take_over(self, new: Entry, keep: Collection[int]) -> Entry:
        """``new`` with the places that others have of its tokens; it holds their keys and values.

        So they are held once, by the entry that was stored last. An entry that has nothing
        else is dropped, and one whose prompt goes on in ``new`` in another way than by its
        answer is the next to be dropped.
        """
        marks = {mark.tokens: mark for mark in new.marks}
        size = len(new.tokens)
        for key, entry in list(self._entries.items()):
            if entry.trimmable:
                continue
            common = common_prefix(entry.tokens, new.tokens)
            for place in entry.places:
                if place <= common and place < size:
                    marks[place] = entry.mark_in(place, new.cache)
            if entry.last <= common:
                self._drop(key)
                continue
            left = tuple(mark for mark in entry.marks if mark.tokens > common)
            self._replace(key, replace(entry, marks=left))
            if entry.turn and common >= entry.turn:
                self._entries.move_to_end(key, last=False)
                self._used[key] = 0
        ordered = tuple(marks[place] for place in sorted(marks))
        return replace(new, marks=ordered).thinned(keep, self._limit)

    def _replace(self, key: int, entry: Entry) -> None:
        more = entry.nbytes - self._entries[key].nbytes
        self._entries[key] = entry
        self.index.put(key, entry)
        self._change(more)


def _anything(_nbytes: int) -> bool:
    return True


def _endless() -> int | None:
    return None
