"""The supervisor of a manager's replicas: starts, watches, restarts and stops them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mlx_engine.core.drain import wait_shielded
from mlx_engine.errors import EngineStopped, describe
from mlx_engine.outputs import EngineState, EngineStats
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.replicas.replica import Factory, Replica, start_together, stop_together
from mlx_engine.remote.replicas.replica_set import ReplicaSet
from mlx_engine.remote.replicas.restarts import GiveUp, RestartPolicy
from mlx_engine.remote.replicas.tasks import cancel_from_anywhere, until_done
from mlx_engine.remote.totals import bygone, total

T = TypeVar("T")

_TASKS = 0.95  # seconds after a deadline that tasks may take to end; the engines are gone then

log = logging.getLogger(__name__)


class Supervisor:
    """The life of the replicas of a manager. For one event loop.

    Args:
        replicas: has the replicas that are there.
        factory: makes the engine of the replica that has the name given.
        policy: when replicas are started again.
        on_failed: told why there is nothing left to keep alive, or nobody to do so.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        factory: Factory,
        policy: RestartPolicy,
        on_failed: Callable[[str], None],
    ) -> None:
        self._replicas = replicas
        self._factory = factory
        self._policy = policy
        self._on_failed = on_failed
        self._numbers = itertools.count(1)
        self._leaving: list[Replica] = []
        self._past: tuple[EngineStats, ...] = ()  # of replicas that are gone
        self._jobs: set[asyncio.Task[Any]] = set()
        self._monitor: asyncio.Task[None] | None = None

    @property
    def everyone(self) -> list[Replica]:
        """The replicas that are there, oldest first, and then those that leave."""
        return [*self._replicas, *self._leaving]

    def stats(self, state: EngineState) -> EngineStats:
        """The counters of all replicas, those that are gone included. From any thread."""
        return total(state, (*self._past, *(replica.stats() for replica in self.everyone)))

    def watch(self) -> None:
        """Run ``monitor_engine_liveness`` from now on."""
        self._replicas.loop = asyncio.get_running_loop()
        self._monitor = asyncio.create_task(self.monitor_engine_liveness(), name="monitor")
        self._monitor.add_done_callback(self._monitor_ended)

    async def monitor_engine_liveness(self) -> None:
        """Wait for the exits of all replicas at once, and for restarts; never returns.

        Restarts go on beside it, so that the other replicas are watched meanwhile.

        Cancellation: those that run go on, and nobody watches them.
        """
        while True:
            with self._replicas.change() as changed:
                tasks = {replica.task: replica for replica in self._replicas if replica.task}
                await asyncio.wait({changed, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task, replica in tasks.items():
                if task.done() and replica.task is task:
                    self._follow_up(replica, task)

    async def grow(self, count: int) -> None:
        """Start so many replicas at once; they are there when all of them run.

        Cancellation: they are stopped, nothing stays behind.

        Raises:
            MLXEngineError: the first error of a start; nothing stays behind either.
            EngineStopped: ``cancel_jobs`` or ``release`` was called meanwhile.
        """
        start = self._beside(self._grow(count))
        if not await until_done(start):
            raise EngineStopped("the manager was stopped while replicas were starting")
        start.result()

    async def shrink(self, count: int) -> None:
        """Let so many replicas finish what they have, and go: the least loaded ones.

        Cancellation: they go on leaving.
        """
        await asyncio.wait([self._dismiss(replica) for replica in self._replicas.idlest(count)])

    def cancel_jobs(self) -> None:
        """Stop replicas that start, or leave. From any thread."""
        for job in list(self._jobs):
            cancel_from_anywhere(job)

    def abandon(self) -> None:
        """Kill everything: its manager became garbage. From any thread."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            cancel_from_anywhere(monitor)
        self.cancel_jobs()
        for replica in self.everyone:
            replica.engine.kill()

    async def release(self, deadline: float | None) -> None:
        """Stop everything, all at the same time; not to be cut short.

        Args:
            deadline: by ``time.monotonic``; what has not stopped then is killed, and it is over
                at most 1 s later.
        """
        engines = [replica.engine for replica in self.everyone]
        work = asyncio.ensure_future(self._let_go(deadline))
        try:
            await wait_shielded(work)
        finally:
            if not work.done() or work.cancelled():  # somebody cancels all tasks
                for engine in engines:
                    engine.kill()

    async def _let_go(self, deadline: float | None) -> None:
        monitor, self._monitor = self._monitor, None
        replicas = self.everyone
        tasks = {monitor, *self._jobs, *self._replicas.leftovers, *(one.task for one in replicas)}
        loop = asyncio.get_running_loop()
        mine = [task for task in tasks if task and task.get_loop() is loop and not task.done()]
        for task in mine:
            task.cancel()
        await stop_together([replica.engine for replica in replicas], deadline)
        if mine:
            left = None if deadline is None else deadline + _TASKS - time.monotonic()
            await asyncio.wait(mine, timeout=left if left is None else max(0.0, left))
        for replica in [*self._replicas.clear(), *self._leaving]:
            self._bury(replica)

    # Replicas that come, end and go ---------------------------------------------------------

    def _new_replica(self) -> Replica:
        return Replica(f"replica-{next(self._numbers)}", self._factory, self._policy)

    async def _grow(self, count: int) -> None:
        new = [self._new_replica() for _ in range(count)]
        await start_together(new)
        for replica in new:
            self._join(replica)

    def _join(self, replica: Replica) -> None:
        """Watch a replica that runs, and give it requests."""
        replica.runs()
        self._replicas.add(replica)

    def _follow_up(self, replica: Replica, task: asyncio.Task[Any]) -> None:
        """Go on after what a replica's task waited for: its exit, or the end of a restart."""
        if replica.info.state == "restarting":
            error = task.exception()
            if error is None:
                log.info("%s runs again", replica.name)
                self._join(replica)
                return
            if not isinstance(error, Exception):
                raise error
            ended = replica.failed_restart(error)
        else:
            ended = task.result()
        self._replicas.down(replica)
        verdict = replica.ended(ended)
        if isinstance(verdict, GiveUp):
            self._give_up(replica, ended, verdict.reason)
            return
        log.warning(
            "%s has ended (%s): %s; it is started again in %.1f s",
            *(replica.name, ended.kind, ended.detail, verdict.after),
        )
        replica.restart(verdict.after)

    def _give_up(self, replica: Replica, ended: Exit, reason: str) -> None:
        log.error("%s is given up: %s; the last end: %s", replica.name, reason, ended.detail)
        self._dismiss(replica)
        if not len(self._replicas):
            why = f"{replica.name} is given up, since {reason}; the last end: {ended.detail}"
            self._replicas.close(f"no replica is left: {why}", ended)
            self._on_failed(f"no replica is left: {why}")

    def _monitor_ended(self, monitor: asyncio.Task[None]) -> None:
        if monitor is not self._monitor:
            return  # by release
        error = None if monitor.cancelled() else monitor.exception()
        log.error("the monitor of the replicas has ended", exc_info=error)
        why = "its task was cancelled" if error is None else describe(error)
        self._replicas.close(f"the replicas are watched no more: {why}", None)
        self._on_failed(f"the replicas are watched no more: {why}")

    def _dismiss(self, replica: Replica) -> asyncio.Task[None]:
        """Give a replica no more requests, let it finish what it has, and be rid of it."""
        self._replicas.remove(replica)
        self._leaving.append(replica)
        return self._beside(self._part(replica, replica.leave()))

    async def _part(self, replica: Replica, ending: asyncio.Task[Any] | None) -> None:
        try:
            if ending is not None:
                await asyncio.wait({ending})
            await replica.engine.shutdown(None)
        except Exception:
            log.exception("%s: its shutdown failed", replica.name)
        finally:
            if replica in self._leaving:
                self._bury(replica)

    def _beside(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something in a task that ``release`` cancels."""
        task = asyncio.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    def _bury(self, replica: Replica) -> None:
        """Forget a replica that is gone; what it has done still counts."""
        self._leaving = [one for one in self._leaving if one is not replica]
        self._past = (bygone(total(EngineState.STOPPED, (*self._past, replica.stats()))),)


def abandoned(supervisor: Supervisor) -> None:
    """Its manager became garbage: nobody will ever stop it."""
    supervisor.abandon()
    warnings.warn(
        "a manager was dropped without being stopped; use 'async with', or await stop()",
        ResourceWarning,
        stacklevel=2,
    )
