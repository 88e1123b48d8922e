"""Whose request goes to an engine next, where clients want more at once than it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeVar

from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.interface import Engine
from mlx_engine.engine.many import at_once
from mlx_engine.server.failures import Failure

K = TypeVar("K")

_WEIGHT = 0.2  # of the last turn in the mean of their seconds


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks.

    Attributes:
        client: a key, or an address.
        user: of that client's users, as it says itself.
    """

    client: bytes = b""
    user: str = ""


@dataclass(slots=True)
class _Line:
    """Requests of one asker that wait.

    Attributes:
        served: the number of the turn that it had last.
    """

    served: float
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Turns:
    """The turns of one engine.

    As many requests as it can do at once are let through, and some that wait in its own queue, so
    that it has no gaps. All others wait here. A turn that comes free is for the client with the
    fewest in work, and of its users for the one with the fewest; among equals for the one that had
    none for the longest time. Who sends a hundred requests delays the next client by no more than
    those that are in work already.
    """

    def __init__(self) -> None:
        self._lines: dict[Asker, _Line] = {}
        self._by_asker: Counter[Asker] = Counter()
        self._by_client: Counter[bytes] = Counter()
        self._given = 0  # turns in work
        self._number = 0  # of the last one
        self._last: dict[Asker, int] = {}  # numbers of the last turns of those in work
        self._seconds = 1.0  # that a turn takes

    @property
    def waiting(self) -> int:
        """How many wait here."""
        return sum(len(line.waiting) for line in self._lines.values())

    @contextlib.asynccontextmanager
    async def turn(self, asker: Asker, engine: Engine) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Cancellation: it leaves at once.

        Raises:
            Failure: as many wait as may, or it has waited as long as it may.
        """
        if not isinstance(engine, BaseEngine):  # which says nothing of what it can do at once
            yield
            return
        if self.waiting or self._given >= at_once(engine.width, engine.queue_limits):
            await self._wait(asker, engine)
        else:
            self._give(asker)
        began = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            seconds = asyncio.get_running_loop().time() - began
            self._seconds += _WEIGHT * (seconds - self._seconds)
            self._take_back(asker, engine)

    async def _wait(self, asker: Asker, engine: BaseEngine) -> None:
        limits = engine.queue_limits
        behind = at_once(engine.width, limits) - engine.width  # those that wait in its own queue
        if limits.queue_limit is not None and self.waiting >= limits.queue_limit - behind:
            raise self._busy("as many requests wait as may", engine)
        # Who has not had any goes before those of the last turn, and behind those of earlier ones.
        line = self._lines.setdefault(asker, _Line(self._last.get(asker, self._number - 0.5)))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append(turn)
        try:
            async with asyncio.timeout(limits.max_wait):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._take_back(asker, engine)
            else:
                self._leave(asker, turn)
            if isinstance(error, TimeoutError):
                said = f"no turn has come within {limits.max_wait:g} s"
                raise self._busy(said, engine) from error
            raise

    def _busy(self, said: str, engine: BaseEngine) -> Failure:
        wait = self._seconds * (self.waiting + 1) / engine.width
        return Failure("busy", f"the engine is busy: {said}", retry_after=wait)

    def _leave(self, asker: Asker, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(asker)
        if line is not None and turn in line.waiting:
            line.waiting.remove(turn)
            if not line.waiting:
                del self._lines[asker]

    def _give(self, asker: Asker) -> None:
        self._given += 1
        self._number += 1
        self._last[asker] = self._number
        self._by_asker[asker] += 1
        self._by_client[asker.client] += 1

    def _take_back(self, asker: Asker, engine: BaseEngine) -> None:
        """End a turn, and give it to whoever is next."""
        self._given -= 1
        _less(self._by_client, asker.client)
        if _less(self._by_asker, asker):
            del self._last[asker]
        while self._lines and self._given < at_once(engine.width, engine.queue_limits):
            following = min(
                self._lines,
                key=lambda a: (self._by_client[a.client], self._by_asker[a], self._lines[a].served),
            )
            line = self._lines[following]
            turn = line.waiting.popleft()
            if not line.waiting:
                del self._lines[following]
            if not turn.done():  # cancelled, and not yet gone
                self._give(following)
                line.served = self._number
                turn.set_result(None)


def _less(counts: Counter[K], key: K) -> bool:
    """Count one less; whether none is left."""
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True
