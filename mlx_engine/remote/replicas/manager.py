"""Several engines as one: requests go to the one that suits them, and those that end come back."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

from mlx_engine.checks import integer, shown
from mlx_engine.config import DEFAULTS, BatchedOptions, EngineKind, QueueConfig
from mlx_engine.core.drain import clean_up
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle, checked_timeout
from mlx_engine.core.stream import Producer
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineStopped, InvalidRequest, MLXEngineError
from mlx_engine.outputs import EngineState, EngineStats, ProgressCallback, ShutdownReport, Usage
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.remote.health import Health
from mlx_engine.remote.process_engine import ProcessEngine
from mlx_engine.remote.ray_engine import RayEngine
from mlx_engine.remote.replicas.abortable_work import AbortableWork
from mlx_engine.remote.replicas.replica import Factory, Replica, ReplicaInfo, Traits, maker
from mlx_engine.remote.replicas.replica_set import ReplicaSet
from mlx_engine.remote.replicas.restarts import RestartPolicy
from mlx_engine.remote.replicas.routed import RoutedRequest, answered
from mlx_engine.remote.replicas.supervisor import Supervisor, abandoned
from mlx_engine.remote.replicas.tasks import all_results
from mlx_engine.remote.replicas.waiting_room import BOUNDED, WaitingRoom, waiting_limits
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.requests import GenerationRequest
from mlx_engine.signatures import spelled_out
from mlx_engine.strategies import EngineDefault, SpecPrefill

T = TypeVar("T")


class EngineManager(BaseEngine):
    """Keeps replicas of an engine alive, each in a process of its own, and is used as one.

    A replica that ends by itself is started again, by ``restart``; one that cannot be kept
    alive is given up, with an error in the log. When none is left the manager is ``FAILED`` and
    requests get ``EngineDead``. A crash, a stall and a start that fails count; a graceful end
    that nobody here has asked for (somebody has sent SIGTERM) does not: the replica comes back
    after the first wait, however often.

    A request goes where the beginning of its prompt has been, unless the load there outweighs
    that. It waits while all replicas restart: 1,024 of them for 600 s at most, or as many as
    ``queue_limit`` says and as long as ``max_wait`` does, which are for each replica as well;
    others get ``EngineBusy``. If its replica ends before anything of the answer has been given
    to the caller, it is done again on another one, from the beginning; after two such ends it
    gets ``EngineDead``, since it may be what kills them. If one is busy the others are asked.

    Each replica has a prompt cache of its own. ``save_prompt_cache`` writes the fullest one, in
    bytes; ``load_prompt_cache`` adds to those of all that are up, gives the number of prompts
    that the one added that took most, and raises the first error of a replica, while others may
    have added them. Those that are started later, or again, begin with an empty one.

    Requests may come from several event loops. ``start``, ``scale`` and ``shutdown`` belong to
    one: the one in which it was started, and in which the replicas are watched.
    """

    @spelled_out(BatchedOptions, DEFAULTS)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        replicas: int = 1,
        engine: EngineKind = "simple",
        restart: RestartPolicy = RestartPolicy(),  # noqa: B008 - it never changes
        watchdog: Watchdog | None = Watchdog(),  # noqa: B008 - it never changes
        on_progress: ProgressCallback | None = None,
        **options: Unpack[BatchedOptions],
    ) -> None:
        """Make a manager; no process is started before the manager is.

        Args:
            model: a folder in mlx-lm's layout, a Hugging Face repository id, or ``"demo"``.
            replicas: how many engines there are to be.
            engine: ``"simple"`` or ``"batched"``, what each of them is.
            restart: when they are started again.
            watchdog: when they count as stuck and are killed; ``None``: never.
            on_progress: told of download and loading by each of them.
            options: as for ``ProcessEngine``, for each of them.

        Raises:
            InvalidRequest: an argument is of the wrong type, out of its range, contradicts
                another one, or is not for this kind of engine.
        """
        kind = {"engine": engine, "watchdog": watchdog, "on_progress": on_progress}
        process = maker(ProcessEngine, model, {**kind, **options})
        self._set_up(process, replicas, restart, waiting_limits(options))

    @classmethod
    @spelled_out(BatchedOptions, DEFAULTS)
    def on_ray(
        cls,
        model: str | os.PathLike[str],
        *,
        replicas: int = 1,
        engine: EngineKind = "simple",
        num_cpus: float = 1,
        resources: Mapping[str, float] | None = None,
        scheduling_strategy: Any = "SPREAD",
        env_vars: Mapping[str, str] | None = None,
        restart: RestartPolicy = RestartPolicy(),  # noqa: B008 - it never changes
        watchdog: Watchdog | None = Watchdog(),  # noqa: B008 - it never changes
        on_progress: ProgressCallback | None = None,
        **options: Unpack[BatchedOptions],
    ) -> Self:
        """A manager whose replicas are on the nodes of a Ray cluster: ``ray.init()`` first.

        Args:
            model: a folder that is on each node, a Hugging Face repository id, or ``"demo"``.
            replicas: how many engines there are to be.
            engine: ``"simple"`` or ``"batched"``, what each of them is.
            num_cpus, resources: what a node must have left for a replica; give each machine a
                resource of its own kind, e.g. ``{"mac": 1}``, to have one replica on each.
            scheduling_strategy: passed on to Ray; by default replicas are spread over nodes.
            env_vars: environment variables for the engines' processes.
            restart, watchdog, on_progress, options: as for the manager itself.

        Raises:
            InvalidRequest: as for the manager itself.
        """
        place = {"num_cpus": num_cpus, "resources": resources, "env_vars": env_vars}
        kind = {"engine": engine, "watchdog": watchdog, "on_progress": on_progress, **place}
        kind["scheduling_strategy"] = scheduling_strategy
        actor = maker(RayEngine, model, {**kind, **options})
        return cls._of(actor, replicas, restart, waiting_limits(options))

    @classmethod
    def _of(
        cls,
        factory: Factory,
        replicas: int = 1,
        restart: RestartPolicy = RestartPolicy(),  # noqa: B008 - it never changes
        limits: QueueConfig = BOUNDED,
    ) -> Self:
        """A manager of engines of any kind; ``factory(name)`` makes one that is not started."""
        manager = cls.__new__(cls)
        manager._set_up(factory, replicas, restart, limits)
        return manager

    def _set_up(
        self, factory: Factory, replicas: int, restart: RestartPolicy, limits: QueueConfig
    ) -> None:
        if not isinstance(restart, RestartPolicy):
            raise InvalidRequest("restart", f"must be RestartPolicy(...), not {shown(restart)}")
        self._wanted = integer("replicas", replicas, low=1)
        # Never started: it checks the options now, and the arguments of requests later.
        self._prototype = factory("prototype")
        self.limits, self.queue_limits = self._prototype.limits, self._prototype.queue_limits
        self.takes_priority = self._prototype.takes_priority
        self._lifecycle = Lifecycle(f"{type(self).__name__} of {replicas} replicas")
        self._replicas = ReplicaSet(WaitingRoom(limits))
        self._supervisor = Supervisor(self._replicas, factory, restart, self._lifecycle.fail)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: weakref.finalize[[Supervisor], EngineManager] | None = None
        self._scaling = asyncio.Lock()
        self._deadline: float | None = None  # of the shutdown, by time.monotonic
        self._traits = Traits()

    @property
    def state(self) -> EngineState:
        return self._lifecycle.state

    @property
    def model(self) -> str | None:
        return self._prototype.model

    @property
    def has_chat_template(self) -> bool:
        return self._traits.has_chat_template

    @property
    def supports_tools(self) -> bool:
        return self._traits.supports_tools

    @property
    def supports_reasoning(self) -> bool:
        return self._traits.supports_reasoning

    @property
    def context_length(self) -> int | None:
        return self._traits.context_length

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """The replicas, oldest first. From any thread."""
        return tuple(replica.info for replica in self._supervisor.everyone)

    def stats(self) -> EngineStats:
        """The counters of all replicas together, those that are gone included.

        ``state`` is the manager's; ``waiting`` and ``rejected`` have those that wait until a
        replica is up, and those that may not. A request that was done again counts in both
        replicas: it has failed in the one that died.
        """
        stats, room = self._supervisor.stats(self.state), self._replicas.room
        waiting, rejected = stats.waiting + room.waiting, stats.rejected + room.rejected
        return replace(stats, waiting=waiting, rejected=rejected)

    def replica_stats(self) -> dict[str, EngineStats]:
        """The counters of each replica, over all its restarts, by its name."""
        return {replica.name: replica.stats() for replica in self._supervisor.everyone}

    def check_health(self) -> dict[str, Health]:
        """The health of each replica, by its name. Cheap; from any thread."""
        everyone = self._supervisor.everyone
        return {replica.name: replica.engine.check_health() for replica in everyone}

    async def start(self) -> None:
        """Start all replicas at once. No-op when the manager runs.

        Cancellation: nothing stays behind, and it can be started again.

        Raises:
            ModelLoadError: a replica cannot load the model; all are stopped again, as with
                every error of a first start.
            InvalidRequest: an option does not suit the model.
            EngineDead: a replica ended while it started.
            EngineStopped: the manager is being shut down.
        """
        loop, supervisor = running_loop(), self._supervisor

        def abort(_: MLXEngineError) -> bool:  # is kept, and must not keep this manager
            supervisor.cancel_jobs()
            return True

        entry = InFlight(self._lifecycle.new_id("start"), loop=loop)
        entry.abort = abort
        if not await self._lifecycle.begin_start(entry):
            return
        try:
            self._loop, self._scaling, self._deadline = loop, asyncio.Lock(), None
            await self._supervisor.grow(self._wanted)
            for one in self._replicas:
                self._traits = Traits.of(one.engine)
            self._supervisor.watch()
            self._finalizer = weakref.finalize(self, abandoned, self._supervisor)
            self._finalizer.atexit = False
            if not self._lifecycle.start_succeeded(entry):
                raise EngineStopped("the manager was stopped while its replicas were starting")
        except BaseException as error:
            if self._lifecycle.is_starter(entry):
                await clean_up(error, self._release)
            raise
        finally:
            self._lifecycle.start_failed(entry)
            self._lifecycle.in_flight.remove(entry)

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Refuse new requests from now on, let those in flight finish, stop all replicas.

        Args:
            timeout: seconds that requests in flight may take; until then they are served as
                ever, by replicas that restart as well. Then they are aborted and their callers
                get ``EngineStopped``, and all replicas are stopped at the same time, or killed:
                it is over at most 1 s later. ``None`` waits for all requests, 0 for none.

        Returns:
            Which requests finished, and which were aborted, by the ids that their callers know.

        May be called any number of times, from several tasks: the earliest deadline counts.

        Cancellation: requests still in flight are aborted, the replicas are stopped, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
            RuntimeError: called in another event loop than ``start``, while that one lives.
        """
        checked_timeout(timeout)
        self._check_loop()
        if timeout is not None:
            deadline = time.monotonic() + timeout
            self._deadline = min(self._deadline or deadline, deadline)
        return await self._lifecycle.shutdown(timeout, self._release)

    async def _clear_failure(self) -> None:
        self._check_loop()
        await self._lifecycle.clear_failure(self._release)

    async def _warm(self, request: GenerationRequest) -> Usage:
        with self._work("warm") as work:
            up = await work.do(self._replicas.until_up())
            return (await work.do(all_results([one.engine._warm(request) for one in up])))[0]

    async def scale(self, replicas: int) -> None:
        """Have so many replicas.

        Those that are new start at once, and take requests when all of them run. Those that are
        to go, the least loaded ones, take no more requests and finish those that they have;
        this returns when they are gone. Calls at the same time are done one after another.

        Cancellation: replicas that start are stopped; those that leave go on doing so.

        Raises:
            InvalidRequest: there must be one at least.
            ModelLoadError, EngineDead: a new replica does not start. None of the new ones
                stays, and those that run are untouched.
            EngineNotStarted, EngineStopped, EngineDead: by the manager's state.
        """
        wanted = integer("replicas", replicas, low=1)
        self._check_loop()
        self.check_running()
        async with self._scaling:
            self.check_running()
            more = wanted - len(self._replicas)
            if more > 0:
                await self._supervisor.grow(more)
            elif more < 0:
                await self._supervisor.shrink(-more)
            self._wanted = wanted

    async def _release(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        await self._supervisor.release(self._deadline)
        self._traits = Traits()

    def _check_loop(self) -> None:
        loop = None if self._lifecycle.inherited else self._loop
        here = running_loop()
        if loop is None or loop.is_closed() or loop is here:
            return
        raise RuntimeError("a manager is scaled and shut down in the event loop that started it")

    def check_running(self) -> None:
        if self.state is EngineState.FAILED and not self._lifecycle.inherited:
            self._replicas.check()  # which knows more of the reason
        self._lifecycle.check_running()

    @property
    def width(self) -> int:
        return max(1, sum(replica.engine.width for replica in self._replicas.up()))

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> Producer:
        self._prototype.submit(request, on_progress)  # only to see whether it can be done
        return RoutedRequest(
            request_id or self._lifecycle.new_id(),
            request,
            on_progress,
            self._lifecycle,
            self._replicas,
            self.check_running,
        )

    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        self._prototype.check_strategies(prefill, decode)

    async def answer(self, question: PromptQuestion) -> PromptFacts:
        running_loop()
        with self._work(question.subject) as work:
            return await answered(question, work, self._replicas)

    async def _save_prompt_cache(self, path: Path) -> int:
        def fullness(one: Replica) -> int:
            return one.engine.stats().prompt_cache.nbytes

        with self._work("save") as work:
            up = await work.do(self._replicas.until_up())
            return await work.do(max(up, key=fullness).engine.save_prompt_cache(path))

    async def _load_prompt_cache(self, path: Path) -> int:
        with self._work("load") as work:
            up = await work.do(self._replicas.until_up())
            loads = all_results([one.engine.load_prompt_cache(path) for one in up])
            return max(await work.do(loads))

    def _work(self, prefix: str) -> AbortableWork:
        self.check_running()
        name = self._lifecycle.new_id(prefix)
        return AbortableWork(name, self._lifecycle, self._replicas.leftovers, reported=False)

    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        return await self._prototype.run_blocking(func, *args, on_cancel=on_cancel, **kwargs)
