"""Pools whose room a test chooses, so that requests are preempted where it wants them to be."""

from __future__ import annotations

from collections.abc import Callable

from mlx_engine import BatchedEngine


class FixedPool:
    """A pool of so many bytes that one engine has for itself; ``None`` is any number."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._parts: dict[str, int] = {}

    def room(self, *kinds: str) -> int | None:
        """See ``Pool``."""
        if self.limit is None:
            return None
        return self.limit - sum(size for kind, size in self._parts.items() if kind not in kinds)

    def most(self, *kinds: str) -> int | None:
        """See ``Pool``."""
        return self.limit

    def claim(self, kind: str, nbytes: int) -> bool:
        """See ``Pool``."""
        room = self.room(kind)
        if room is not None and room < nbytes > self._parts.get(kind, 0):
            return False
        self._parts[kind] = nbytes
        return True


class Moments(FixedPool):
    """A pool without a bound that for a moment has no room at all.

    Args:
        when: by the number of a claim for requests in work, from 1 on, whether it is refused.
    """

    def __init__(self, when: Callable[[int], object]) -> None:
        super().__init__(None)
        self._when = when
        self.looks = 0

    def claim(self, kind: str, nbytes: int) -> bool:
        if kind == "live" and nbytes:
            self.looks += 1
            if self._when(self.looks):
                return False
        return super().claim(kind, nbytes)


class Again(Moments):
    """A pool without a bound in which every so often there is no room, counted from a time when
    nobody has any.

    Args:
        period: looks of which the last one finds none.
        rarer: whether each is twice as long as the one before, so that whoever is preempted gets
            further every time.
    """

    def __init__(self, period: int, *, rarer: bool = False) -> None:
        super().__init__(self._due)
        self._period = period
        self._rarer = rarer

    def _due(self, look: int) -> bool:
        due = look % self._period == 0
        if due and self._rarer:
            self._period *= 2
        return due

    def claim(self, kind: str, nbytes: int) -> bool:
        if kind == "live" and not nbytes:
            self.looks = 0
        return super().claim(kind, nbytes)


class Shut(FixedPool):
    """A pool without a bound in which there is no room for requests while it is shut."""

    def __init__(self) -> None:
        super().__init__(None)
        self.shut = False

    def claim(self, kind: str, nbytes: int) -> bool:
        if kind == "live" and nbytes and self.shut:
            return False
        return super().claim(kind, nbytes)

    def room(self, *kinds: str) -> int | None:
        return 0 if self.shut and "live" in kinds else None


class Watched(FixedPool):
    """A pool that keeps the most that was ever claimed."""

    def __init__(self, limit: int | None) -> None:
        super().__init__(limit)
        self.peak = 0

    def claim(self, kind: str, nbytes: int) -> bool:
        claimed = super().claim(kind, nbytes)
        self.peak = max(self.peak, sum(self._parts.values()))
        return claimed


def give(engine: BatchedEngine, pool: FixedPool) -> None:
    """Let a running engine that has nothing to do take its memory from this pool."""
    engine._holder.budget.pool = pool


def begin_with(engine: BatchedEngine, make: Callable[[], FixedPool]) -> BatchedEngine:
    """Let an engine take it from such a pool whenever it is started."""
    engine._holder._make_pool = make  # type: ignore[method-assign]
    return engine
