"""The ledger of memory: who has how much of what the engines of this process may have together.

One a process, for models, drafts, KV caches of requests, stored prompts, and engines in processes
of their own. It is a pool: an engine has an account in it, and takes what it needs when it needs
it. When something does not fit, MLX's free buffers are given back, and then stored prompts give
way, the engine's own first, then those of any engine, least recently used first.

No MLX here, and no bytes are counted: owners tell what they have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.machine import Machine, this_machine
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.memory_stats import (
    MemoryOwner,
    MemoryStats,
    MemoryUse,
    PressureStage,
)

_PART = 10  # one of so many parts of what models leave is for the computing itself
_GIVES_WAY = "stored"  # what no other has to give way to


class Stored(Protocol):
    """An engine's stored prompts. On the MLX thread."""

    def oldest(self) -> float | None:
        """When that was used which was not used for longest, by a clock that all of them share;
        ``None`` if nothing is stored.
        """

    def evict(self) -> None:
        """Drop that."""


class Lent(Protocol):
    """Memory that can be had back from whom it was given to, though not at once."""

    def spare(self) -> int:
        """Bytes that it has no use for now. From any thread."""

    def give_back(self, nbytes: int) -> None:
        """Ask it for so many of them; it claims less when they are free. From any thread."""

    @property
    def pending(self) -> bool:
        """Whether it has been asked, and has not answered. From any thread."""


class Ledger:
    """An account for each engine, and the sum of all. Every method may be called from any thread.

    Args:
        machine: whose memory it is.
        may_evict: whether stored prompts, which are on the MLX thread, may be dropped here.

    Attributes:
        machine: the same; its memory is looked at when the first account is opened.
        clear_cache: gives back memory that nobody has; called where ``may_evict``.
        stage: what is given up while the system is short of memory.
        relief_due: whether ``relieve`` has something to do.
    """

    def __init__(
        self,
        machine: Machine,
        may_evict: Callable[[], bool] = lambda: True,
        clear_cache: Callable[[], None] = lambda: None,
    ) -> None:
        self.machine = machine
        self.may_evict = may_evict
        self.clear_cache = clear_cache
        self.stage: PressureStage = "none"
        self.relief_due = False
        self._total: int | None = None
        self._accounts: list[Account] = []
        self._lock = threading.RLock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In a fork of this process: the engines are not there, and the lock may be held."""
        self._lock = threading.RLock()
        self._accounts = []

    @property
    def total(self) -> int | None:
        """Bytes that all engines of this process may have together; ``None``: no bound is known."""
        with self._lock:
            return self._total if self._accounts else self.machine.available()

    @property
    def accounts(self) -> tuple[Account, ...]:
        """Accounts that are open, oldest first."""
        with self._lock:
            return tuple(self._accounts)

    @property
    def use(self) -> MemoryUse:
        """Memory that all of them have."""
        with self._lock:
            return _sum(self._accounts)

    @property
    def free(self) -> int | None:
        """Bytes that a model could have now; ``None`` if there is no bound."""
        with self._lock:
            total = self.total
            return None if total is None else max(0, total - _charge(_sum(self._accounts)))

    def account(self, name: str, limit: int | None = None) -> Account:
        """Open an account.

        Args:
            name: of the engine, for ``owners``.
            limit: bytes that it may have; ``None``: as many as all together.
        """
        with self._lock:
            if not self._accounts:
                self._total = self.machine.available()
            account = Account(self, name, limit)
            self._accounts.append(account)
            return account

    def known(self, machine: Machine) -> None:
        """More is known of the machine than before: MLX has told what its device may have."""
        with self._lock:
            if machine != self.machine:
                self.machine, self._total = machine, machine.available()

    def owners(self) -> tuple[MemoryOwner, ...]:
        """All who have memory, and how much."""
        return tuple(MemoryOwner(one.name, one.limit, one.use) for one in self.accounts)

    def relieve(self) -> None:
        """Give up what the stage says, if that is due. On the MLX thread, between steps."""
        if not self.relief_due:
            return
        self.relief_due = False
        with self._lock:
            most = self.use.stored // 2
            while self.use.stored > most and self._evict_oldest(self._accounts):
                pass
        if self.stage in ("clear", "stop"):
            self.clear_cache()

    # For its accounts, under the lock -------------------------------------------------------

    def locked(self) -> threading.RLock:
        """Hold it; what was looked at within stays as it is."""
        return self._lock

    def bound(self) -> int | None:
        """``total``, without a look at the machine."""
        return self._total

    def others(self, account: Account, *but: str) -> MemoryUse:
        """Memory that all but one have.

        Args:
            but: kinds of which they count as having none.
        """
        others = _sum([one for one in self._accounts if one is not account])
        return replace(others, **dict.fromkeys(but, 0))

    def make_way(self, account: Account, fits: Callable[[], bool], *, own: bool = False) -> bool:
        """Drop stored prompts until ``fits``, its own first; whether it does.

        Args:
            own: no others than those.
        """
        if not self.may_evict():
            return False
        self.clear_cache()
        for owners in ([account],) if own else ([account], self._accounts):
            while not fits() and self._evict_oldest(owners):
                pass
        return fits()

    def _evict_oldest(self, owners: list[Account]) -> bool:
        """Drop what was not used for longest of all that these have stored, if there is any."""
        places = [
            (age, one.stored)
            for one in owners
            if one.stored is not None and (age := one.stored.oldest()) is not None
        ]
        if places:
            min(places, key=lambda place: place[0])[1].evict()
        return bool(places)

    def close(self, account: Account) -> None:
        """Forget an account."""
        with self._lock:
            if account in self._accounts:
                self._accounts.remove(account)


class Account:
    """The memory of one engine, or the part of one in another process. From any thread.

    Attributes:
        name: of the engine.
        stored: its stored prompts, which may have to give way.
        lent: how to have memory back from it, if that takes asking.
        planned: whether it may plan with all that is free: it was told how much it may have, or
            the machine's memory is for engines.
        peak: the most bytes that it has had.
        refused: how often a claim did not fit.
    """

    def __init__(self, ledger: Ledger, name: str, limit: int | None) -> None:
        self.name = name
        self.stored: Stored | None = None
        self.lent: Lent | None = None
        self.planned = limit is not None or ledger.machine.devoted
        self.peak = self.refused = 0
        self._ledger = ledger
        self._limit = limit
        self._use = MemoryUse()
        self._shares: list[tuple[frozenset[str], int]] = []
        self._open = True

    @property
    def limit(self) -> int | None:
        """Bytes that it may have; ``None``: as many as all engines together."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        """Nothing is taken from it that is more than that; it cannot grow as long as it is."""
        with self._ledger.locked():
            self._limit = limit

    @property
    def use(self) -> MemoryUse:
        """Memory that it has."""
        return self._use

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._open

    def share(self, kinds: tuple[str, ...], nbytes: int) -> None:
        """Let these kinds together have ``nbytes`` at most."""
        with self._ledger.locked():
            self._shares.append((frozenset(kinds), nbytes))

    def claim(self, kind: str, nbytes: int) -> bool:
        """Have ``nbytes`` of this kind from now on, instead of what it was.

        Stored prompts give way where that is needed, unless they are what is to grow. Less never
        fails; a closed account has nothing, and gets nothing.

        Returns:
            Whether it fits; nothing has changed if it does not.
        """
        with self._ledger.locked():
            if nbytes > getattr(self._use, kind) and not self._can_have(kind, nbytes):
                self.refused += 1
                return False
            self.set(kind, nbytes)
            return True

    def set(self, kind: str, nbytes: int) -> None:
        """Have ``nbytes`` of this kind, whether they fit or not: they are there already."""
        with self._ledger.locked():
            if self._open:
                self._use = replace(self._use, **{kind: nbytes})
                self.peak = max(self.peak, self._use.total)

    def room(self, *kinds: str) -> int | None:
        """Bytes that these kinds may come to together now; ``None`` if nothing bounds them.

        That is what it has of them, what is free, and what others have stored, which gives way to
        all kinds but that. While the system is short of memory nothing is to be stored.
        """
        if kinds == (_GIVES_WAY,) and self._ledger.stage != "none":
            return 0
        return self._room(kinds, () if kinds == (_GIVES_WAY,) else (_GIVES_WAY,))

    def most(self, *kinds: str) -> int | None:
        """Bytes that these kinds could come to if no request of another engine were in work."""
        return self._room(kinds, ("live", _GIVES_WAY))

    def _room(self, kinds: tuple[str, ...], but: tuple[str, ...]) -> int | None:
        with self._ledger.locked():
            rest = replace(self._use, **dict.fromkeys(kinds, 0))
            rooms = [
                most - sum(getattr(rest, one) for one in shared)
                for shared, most in self._shares
                if shared.issuperset(kinds)
            ]
            room = room_for_caches if {"live", _GIVES_WAY}.issuperset(kinds) else _room_for_models
            total = self._ledger.bound()
            if self._limit is not None:
                rooms.append(room(self._limit, rest))
            if total is not None:
                rooms.append(room(total, self._ledger.others(self, *but) + rest))
            return max(0, min(rooms)) if rooms else None

    def stats(self) -> MemoryStats:
        """A snapshot."""
        with self._ledger.locked():
            return MemoryStats(
                total=self._ledger.total,
                limit=self._limit,
                use=self._use,
                peak=self.peak,
                refused=self.refused,
                stage=self._ledger.stage,
                owners=self._ledger.owners(),
            )

    def shed(self) -> None:
        """Drop its stored prompts until it has no more than it may have. On the MLX thread."""
        with self._ledger.locked():
            self._ledger.make_way(self, lambda: self._fits("live", self._use.live), own=True)

    def close(self) -> None:
        """Have nothing any more; may be called again."""
        with self._ledger.locked():
            self._open = False
            self._use = MemoryUse()
            self.stored = self.lent = None
            self._ledger.close(self)

    def _can_have(self, kind: str, nbytes: int) -> bool:
        """Whether there is room, which stored prompts may make."""
        if not self._open:
            return False
        if kind == _GIVES_WAY:
            return self._ledger.stage == "none" and self._fits(kind, nbytes)
        if self._fits(kind, nbytes):
            return True
        if not self._fits(kind, nbytes, but=_GIVES_WAY):
            return False  # and nobody loses anything
        return self._ledger.make_way(self, lambda: self._fits(kind, nbytes))

    def _fits(self, kind: str, nbytes: int, *, but: str | None = None) -> bool:
        """Whether it could have that; with ``but``, if nobody had anything of that kind."""
        none = {} if but is None else {but: 0}
        wanted = replace(self._use, **{**none, kind: nbytes})
        for shared, most in self._shares:
            if kind in shared and sum(getattr(wanted, one) for one in shared) > most:
                return False
        if self._limit is not None and _charge(wanted) > self._limit:
            return False
        total = self._ledger.bound()
        return total is None or _charge(self._ledger.others(self, *none) + wanted) <= total


def _sum(accounts: list[Account]) -> MemoryUse:
    return sum((one.use for one in accounts), MemoryUse())


def _charge(use: MemoryUse) -> int:
    """Bytes to be set aside for it: caches come with what computing them takes besides."""
    return use.models - (-use.caches * _PART // (_PART - 1))


def _room_for_models(most: int, use: MemoryUse) -> int:
    """Bytes of models that fit beside ``use`` into ``most``."""
    return most - _charge(use)


def room_for_caches(most: int, use: MemoryUse) -> int:
    """Bytes of caches that fit beside ``use`` into ``most``, with what computing them takes."""
    return (most - use.models) * (_PART - 1) // _PART - use.caches


def ledger() -> Ledger:
    """The ledger of this process."""
    return _LEDGER


_LEDGER = Ledger(this_machine(), mlx_thread.is_current)
