"""The replicas of a manager: which there are, which can be asked, and who waits for one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.wakeup import Broadcast
from mlx_engine.errors import EngineDead
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.replicas.replica import Replica
from mlx_engine.remote.replicas.routing import RequestCost, Router
from mlx_engine.remote.replicas.waiting_room import WaitingRoom

_SOONEST = 1.0  # seconds after which to try again, at least
_RECHECK = 1.0  # seconds after which to look whether an event loop was closed meanwhile


class NoneUp(Exception):
    """Raised if no replica can be asked now; never leaves this package."""


class ReplicaSet:
    """Replicas, and the router among them. Every method may be called from any thread.

    Args:
        room: for requests that wait until a replica is up.

    Attributes:
        room: the same.
        leftovers: tasks of requests that were aborted; see ``AbortableWork``.
        loop: the event loop in which replicas are watched and restarted, once it is known.
    """

    def __init__(self, room: WaitingRoom) -> None:
        self.room = room
        self.leftovers: set[asyncio.Task[Any]] = set()
        self._lock = threading.RLock()
        self._router = Router()
        self._replicas: dict[str, Replica] = {}
        self._changed = Broadcast()
        self._end: tuple[str, Exit | None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Forget who waits in a fork of this process, where the lock may be held."""
        self._lock = threading.RLock()
        self._changed, self.loop = Broadcast(), None
        self.room.after_fork()

    def __iter__(self) -> Iterator[Replica]:
        """The replicas that are there now, oldest first; one that leaves is not."""
        with self._lock:
            return iter(list(self._replicas.values()))

    def __len__(self) -> int:
        return len(self._replicas)

    def add(self, replica: Replica) -> None:
        """Have a replica from now on, which is up if it runs."""
        with self._lock:
            self._replicas[replica.name] = replica
            self._router.join(replica.name)
            self._changed.notify()

    def down(self, replica: Replica) -> None:
        """Ask a replica no more for now; what it knew is gone."""
        with self._lock:
            self._router.leave(replica.name)
            self._changed.notify()

    def ended(self, name: str, engine: LinkedEngine) -> None:
        """Ask ``engine`` no more, since it told a request that it is gone, or ends.

        Its exit follows, if it is not known already; then the replica is restarted.
        """
        with self._lock:
            replica = self._replicas.get(name)
            if replica is not None and replica.engine is engine:
                self._router.leave(name)

    def remove(self, replica: Replica) -> None:
        """Have a replica no more."""
        with self._lock:
            self._router.leave(replica.name)
            self._replicas.pop(replica.name, None)
            self._changed.notify()

    def clear(self) -> list[Replica]:
        """Have no replicas any more; gives those that were there. The set may be used again."""
        with self._lock:
            replicas = list(self._replicas.values())
            for replica in replicas:
                self.remove(replica)
            self._end = None
            return replicas

    def close(self, reason: str, last_exit: Exit | None) -> None:
        """Tell whoever waits for a replica why none will come up any more."""
        with self._lock:
            self._end = reason, last_exit
            self._changed.notify()

    def check(self) -> None:
        """Raise ``EngineDead``, with what is known of the last end, if the set is closed, or
        if nobody is left to bring replicas back.
        """
        if self.loop is not None and self.loop.is_closed() and not self.up():
            raise EngineDead("no replica is up, and the manager's event loop is closed")
        if (end := self._end) is None:
            return
        reason, last_exit = end
        raise EngineDead(reason) if last_exit is None else last_exit.error(reason)

    def up(self, excluded: Collection[str] = ()) -> list[Replica]:
        """The replicas that can be asked now."""
        with self._lock:
            return [
                replica
                for name, replica in self._replicas.items()
                if name in self._router and name not in excluded and replica.up
            ]

    @contextmanager
    def assigned(
        self, cost: RequestCost, excluded: Collection[str]
    ) -> Iterator[tuple[str, LinkedEngine]]:
        """A replica, by its name and engine, at which a request is outstanding within.

        Raises:
            NoneUp: none can be asked.
        """
        with self._lock:
            name = self._router.choose(cost, [one.name for one in self.up(excluded)])
            if name is None:
                raise NoneUp
            engine = self._replicas[name].engine
        try:
            yield name, engine
        finally:
            with self._lock:
                replica = self._replicas.get(name)
                if replica is not None and replica.engine is engine:  # not of its next life
                    self._router.done(name, cost)

    def idlest(self, count: int) -> list[Replica]:
        """The ``count`` replicas that are missed least: not up, or with least outstanding."""
        with self._lock:
            order = enumerate(self._replicas.values())
            ranked = sorted(
                order, key=lambda one: (one[1].up, self._router.outstanding(one[1].name), -one[0])
            )
            return [replica for _, replica in ranked[:count]]

    async def until_up(self, waited: float = 0.0, max_wait: float | None = None) -> list[Replica]:
        """Wait until replicas can be asked; gives them.

        Args:
            waited: seconds that the request has waited before.
            max_wait: seconds that its caller lets it wait.

        Raises:
            EngineDead: the set is closed.
            EngineBusy: too many wait, or this one has for too long.
        """
        self.check()
        if up := self.up():
            return up
        began = time.monotonic()
        with self.room.entered(self._retry_after(), max_wait):
            while True:
                with self.change() as changed:
                    self.check()
                    if up := self.up():
                        return up
                    so_far = waited + time.monotonic() - began
                    left = self.room.left(so_far, self._retry_after(), max_wait)
                    timeout = _RECHECK if left is None else min(left, _RECHECK)
                    await asyncio.wait({changed}, timeout=timeout)

    def _retry_after(self) -> float:
        """Seconds until a replica is likely to be up."""
        return max(_SOONEST, min((one.up_in() for one in self), default=_SOONEST))

    @contextmanager
    def change(self) -> Iterator[asyncio.Future[None]]:
        """A future of the running event loop that is done at the next change, within."""
        with self._lock:
            future = self._changed.watch()
        try:
            yield future
        finally:
            self._changed.forget(future)
