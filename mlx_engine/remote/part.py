"""The part of this machine's memory that an engine in a process of its own may have.

It is in the ledger of the process that starts it. What was asked for in bytes, or as a fraction, is
its own for as long as it lives. By ``"auto"`` it gets what is free, shared with those that start at
the same time, and what it has no use for can be had back for another one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from mlx_engine.config import DEMO_MODEL, EngineConfig
from mlx_engine.core.ledger import Account, Ledger, ledger
from mlx_engine.core.machine import memory_limit
from mlx_engine.core.reclaim import is_member, members, reclaim
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.errors import NotEnoughMemory
from mlx_engine.memory_stats import MemoryStats, MemoryUse
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.wire.messages import Budget, encode

_SPARE = 8  # one of so many parts of what it has in use is left to it when others want memory


class Part:
    """The part of one life of an engine's process. From any thread, but for ``take``.

    Args:
        name: of the engine.
        config: what it is made with.

    Attributes:
        starting: whether it waits for its part.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.starting = True
        self._send: Callable[[bytes], None] | None = None  # to the process, once it is there
        self._name = name
        self._config = config
        self._lock = threading.Lock()
        self._account: Account | None = None
        self._weights = 0  # bytes, by its files, where they are known here
        self._book = ledger()
        self._bounded = False
        self._limit = 0  # the latest that it was told
        self._use = MemoryUse()  # the latest that it has told
        self._pending = False  # it was asked for some of it, and has not answered

    async def take(self) -> None:
        """Take the part, which is of any size where nothing bounds it.

        Cancellation: nothing is taken.

        Raises:
            InvalidRequest: it may have more than the machine has.
            NotEnoughMemory: there is not enough for what it was made with.
        """
        book = self._book
        memory = memory_limit(self._config.model.memory, book.machine)
        account = self._account = book.account(self._name)
        account.lent = self
        try:
            await asyncio.sleep(0)  # others that start with it are known then
            self._weights = _weights(self._config)
            needed = self._weights if memory is None else memory
            await reclaim(book, needed)
            given = self._given(book) if memory is None else memory
            if given is None:
                return
            available = book.free or 0
            if given < needed or not account.claim("processes", given):
                raise _too_little(self._name, needed, available, book)
            self._limit, self._bounded = given, True
            if memory is not None:
                account.lent = None  # that is its own
        except BaseException:
            self.close()
            raise
        finally:
            self.starting = False

    async def place(self, link: Link) -> None:
        """Know what is at the other end, now that a link is open; where that has to be known."""

    def begin(self, send: Callable[[bytes], None]) -> int | None:
        """The bytes of the process, which is there now, or ``None`` where nothing bounds it.

        Args:
            send: sends it a frame, behind the one that tells it these bytes.
        """
        with self._lock:
            self._send = send
            return self._limit if self._bounded else None

    def told(self, stats: MemoryStats) -> None:
        """The process has told what it has, and may have."""
        with self._lock:
            account, self._use = self._account, stats.use
            if account is None or account.lent is None or not self._limit:
                return
            if stats.limit is not None and stats.limit <= self._limit:  # it knows
                self._pending = False
                account.set("processes", max(self._limit, stats.use.total))

    def took(self, limit: int, used: int) -> None:
        """The process has heard that it may have ``limit`` bytes, and has ``used`` of them."""
        with self._lock:
            if self._account is not None and limit == self._limit:
                self._pending = False
                self._account.set("processes", max(limit, used))

    @property
    def pending(self) -> bool:
        """See ``Lent``."""
        return self._pending

    def spare(self) -> int:
        """Bytes that it has no use for now: stored prompts may give way."""
        with self._lock:
            if self._account is None:
                return 0
            firm = max(self._use.models + self._use.live, self._weights)
            if not firm:  # nothing is known of its model by now
                return self._limit // 2
            return max(0, self._limit - firm - firm // _SPARE)

    def give_back(self, nbytes: int) -> None:
        """Ask it for so many bytes of what it has to spare."""
        with self._lock:
            left = max(0, self._limit - nbytes)
            if self._send is not None:
                self._pending = self._pending or left != self._limit
            elif self._account is not None:  # it does not know of more
                self._account.set("processes", left)
            self._tell(left)

    def grow(self, nbytes: int) -> None:
        """Let it have so many bytes more, if they are free."""
        with self._lock:
            account = self._account
            if account is None or not self._limit:
                return
            if account.claim("processes", max(account.use.processes, self._limit + nbytes)):
                self._tell(self._limit + nbytes)

    def close(self) -> None:
        """Give everything back: the process is gone. May be called again."""
        with self._lock:
            account, self._account, self._send = self._account, None, None
        if account is not None:
            account.close()
            share_out(self._book)

    def _tell(self, limit: int) -> None:
        if limit != self._limit:
            self._limit = limit
            if self._send is not None:
                self._send(encode([Budget(limit)]))

    def _given(self, book: Ledger) -> int | None:
        """Its share of what is free: with those that start now, and engines of this process."""
        if (free := book.free) is None:
            return None
        lent = [one.lent for one in book.accounts]
        starting = sum(isinstance(one, Part) and one.starting for one in lent)
        here = sum(one.use.weights > 0 for one in book.accounts)
        share = free // max(1, starting + here)
        return min(free, max(share, self._weights + self._weights // _SPARE))


def share_out(book: Ledger) -> None:
    """Let those that have parts have what has become free."""
    free, count = book.free, members(book)
    if not free or not count:
        return
    for one in book.accounts:
        if isinstance(one.lent, Part) and is_member(one):
            one.lent.grow(free // count)


def _weights(config: EngineConfig) -> int:
    """Bytes of the weights of a model in a folder, its drafts' too; others are not known here."""
    names = (config.model.model, *config.strategies.drafts)
    try:
        return sum(stored_bytes(Path(name).expanduser()) for name in names if name != DEMO_MODEL)
    except OSError:  # it says so itself
        return 0


def _too_little(name: str, needed: int, available: int, book: Ledger) -> NotEnoughMemory:
    has = ", ".join(f"{one.name} has {one.use.total}" for one in book.accounts if one.use.total)
    return NotEnoughMemory(
        f"{name} needs {needed} bytes of memory, and {available} are left of the {book.total} that "
        f"the engines of this process may have together; {has or 'nobody has any'}. Stop another "
        "engine, give others less (memory), or take a smaller model or one that is quantised",
        needed=needed,
        available=available,
    )
