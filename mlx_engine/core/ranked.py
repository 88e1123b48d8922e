"""A heap that can be left anywhere."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")
Rank = tuple[int, ...]

FAIR = 8  # every eighth that is taken is the one that came first, whatever the priorities
_SOME = 16  # ranks of things that have left, which may stay whatever the size


class Ranked(Generic[T]):
    """Things in the order of their ranks, no two of which are the same. For one thread.

    What has left is not held: only its rank stays for a while.
    """

    def __init__(self) -> None:
        self._heap: list[Rank] = []
        self._things: dict[Rank, T] = {}

    def __len__(self) -> int:
        return len(self._things)

    def add(self, rank: Rank, thing: T) -> None:
        """Put it in its place."""
        self._things[rank] = thing
        heapq.heappush(self._heap, rank)

    def discard(self, rank: Rank) -> None:
        """Take it out, if it is in."""
        self._things.pop(rank, None)
        if len(self._heap) > 2 * len(self._things) + _SOME:
            self._forget()

    def first(self) -> T | None:
        """The one of the lowest rank."""
        while self._heap and self._heap[0] not in self._things:
            heapq.heappop(self._heap)
        return self._things[self._heap[0]] if self._heap else None

    def below(self, rank: Rank, most: int) -> int:
        """How many have a lower rank, counted up to ``most``; hardly any others are looked at."""
        self.first()
        found = gone = 0
        places = [0]
        while places and found < most:
            place = places.pop()
            if place < len(self._heap) and self._heap[place] < rank:
                here = self._heap[place] in self._things
                found, gone = found + here, gone + (not here)
                places += (2 * place + 1, 2 * place + 2)  # its children; all lower ones are there
        if gone > _SOME:
            self._forget()
        return found

    def _forget(self) -> None:
        """Drop the ranks of what has left."""
        self._heap = list(self._things)
        heapq.heapify(self._heap)
