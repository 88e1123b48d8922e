"""A replica: the engine that it has now, those that it had, and how it gets the next."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_engine.core.drain import finish
from mlx_engine.errors import EngineDead, describe
from mlx_engine.outputs import EngineState, EngineStats
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.replicas.restarts import GiveUp, Restart, RestartHistory, RestartPolicy
from mlx_engine.remote.totals import bygone, total

Factory = Callable[[str], LinkedEngine]
ReplicaState = Literal["starting", "running", "restarting", "leaving"]

_GENTLE = 5.0  # seconds that an engine may take to stop when there is no deadline
_GRACE = 0.6  # seconds after a deadline until what has not stopped is killed
_KILL = 0.3  # seconds until what was killed is gone, at most

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A snapshot of a replica, as a manager tells of it.

    Attributes:
        name: it keeps its name when it is restarted.
        state: ``leaving`` takes no requests any more, and finishes those it has.
        restarts: how often it was restarted, or that was tried.
        last_exit: how it ended the last time; ``None`` if it never has.
        pid: of its process, if that is on this machine and there is one now.
    """

    name: str
    state: ReplicaState
    restarts: int
    last_exit: Exit | None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """Traits of the model that all replicas have; those of none where nothing is loaded."""

    has_chat_template: bool = False
    supports_tools: bool = False
    supports_reasoning: bool = False
    context_length: int | None = None

    @classmethod
    def of(cls, engine: LinkedEngine) -> Traits:
        """The traits of the model that an engine has loaded."""
        return cls(
            engine.has_chat_template,
            engine.supports_tools,
            engine.supports_reasoning,
            engine.context_length,
        )


class Replica:
    """A place in a manager that one engine after another fills. For one event loop.

    Attributes:
        engine: the one of the moment; while it restarts, the old one or the next.
        task: what the monitor waits for: the exit of the engine, or the restart.
    """

    def __init__(self, name: str, factory: Factory, policy: RestartPolicy) -> None:
        self.name = name
        self.engine = factory(name)
        self.task: asyncio.Task[Any] | None = None
        self._factory = factory
        self._history = RestartHistory(policy)
        self._state: ReplicaState = "starting"
        self._restarts = 0
        self._last_exit: Exit | None = None
        self._past: tuple[EngineStats, ...] = ()
        self._due = 0.0  # the next start, by time.monotonic
        self._took = 0.0  # seconds, the latest start

    @property
    def info(self) -> ReplicaInfo:
        """A snapshot."""
        pid = self.engine.pid
        return ReplicaInfo(self.name, self._state, self._restarts, self._last_exit, pid)

    @property
    def up(self) -> bool:
        """True if requests can be given to it. From any thread."""
        return self._state == "running" and self.engine.state is EngineState.RUNNING

    def stats(self) -> EngineStats:
        """The counters of all engines that it had. From any thread."""
        now = self.engine.stats()
        return total(now.state, (*self._past, now))

    def up_in(self) -> float:
        """Seconds until it is likely to be up. From any thread."""
        return max(0.0, self._due + self._took - time.monotonic())

    async def start(self) -> None:
        """Start the engine; raises what that raises, and is cancelled like that."""
        began = time.monotonic()
        await self.engine.start()
        self._took = time.monotonic() - began

    def runs(self) -> None:
        """Wait for the exit of the engine, which has been started, in ``task``."""
        self._history.started(time.monotonic())
        self._state = "running"
        self.task = asyncio.create_task(self.engine.wait_exit(), name=f"{self.name} exit")

    def ended(self, exit: Exit) -> Restart | GiveUp:
        """Decide what follows: the engine has ended by itself, or could not be started again."""
        self._state = "restarting"
        self._last_exit = exit
        return self._history.ended(time.monotonic(), counts=exit.kind != "graceful")

    def restart(self, after: float) -> None:
        """Get another engine ``after`` so many seconds, in ``task``."""
        self._due = time.monotonic() + after
        self.task = asyncio.create_task(self._restart(after), name=f"{self.name} restart")

    def failed_restart(self, error: BaseException) -> Exit:
        """The end of the engine that ``restart`` could not start; never ``graceful``."""
        last = self.engine.last_exit
        if last is not None and last.kind != "graceful" and isinstance(error, EngineDead):
            return last
        # Its process has told the error and left, which says less than the error does.
        return Exit("crash", f"it did not start: {describe(error)}", phase="load")

    def leave(self) -> asyncio.Task[Any] | None:
        """Stop watching and restarting it; gives the task that this may have ended."""
        self._state = "leaving"
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
        return task

    async def _restart(self, after: float) -> None:
        await stop_together([self.engine])
        await asyncio.sleep(after)
        self._restarts += 1
        engine, past = self._factory(self.name), bygone(self.stats())
        self.engine, self._past = engine, (past,)
        await self.start()


def maker(kind: Any, model: Any, options: dict[str, Any]) -> Factory:
    """A factory of engines of a kind, with these options."""

    def make(name: str) -> LinkedEngine:
        engine: LinkedEngine = kind(model, name=name, **options)
        return engine

    return make


async def start_together(replicas: Sequence[Replica]) -> None:
    """Start all at once.

    Cancellation: those that run by then are stopped again, nothing stays behind.

    Raises:
        BaseException: the first error of a start; nothing stays behind either.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for replica in replicas:
                group.create_task(replica.start(), name=f"{replica.name} start")
    except BaseException as error:
        await finish(lambda: stop_together([one.engine for one in replicas]))
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise


async def stop_together(engines: Iterable[LinkedEngine], deadline: float | None = None) -> None:
    """Stop all at once; those that are late are killed. Raises no error of theirs.

    Args:
        deadline: by ``time.monotonic``; it takes at most 1 s longer.
    """
    stops = {asyncio.create_task(engine.stop(), name="stop"): engine for engine in engines}
    if not stops:
        return
    left = _GENTLE if deadline is None else max(0.0, deadline - time.monotonic()) + _GRACE
    try:
        _, late = await asyncio.wait(stops, timeout=left)
        for stop in late:
            stops[stop].kill()
        if late:
            await asyncio.wait(late, timeout=_KILL if deadline is not None else None)
    finally:
        for stop, engine in stops.items():
            if not stop.done():
                engine.kill()
                stop.cancel()
            elif not stop.cancelled() and (error := stop.exception()) is not None:
                log.error("%s: its stop failed", engine.name, exc_info=error)
