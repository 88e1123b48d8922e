"""Schedulers: how an engine's requests, and all else that it does, get to the MLX thread."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from mlx_engine.config import QueueConfig
from mlx_engine.core.admission import Admission
from mlx_engine.core.batch_queue import BatchQueue, QueuedRequest, R, Schedulable
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.lifecycle import Lifecycle
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.preparer import Preparer, Preparing
from mlx_engine.core.side_work import SideQueue, SideWork
from mlx_engine.core.sliced_job import Rest, SlicedJob
from mlx_engine.core.work import PendingWork, ThreadJob
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import GenerationResult

T = TypeVar("T")

Prepare = Callable[[R], MLXEngineError | None]


class Scheduler(abc.ABC, Generic[R]):
    """An engine's way to the MLX thread, behind its admission.

    Args:
        lifecycle: the engine's state.
        limits: of the queue.
        prepare: makes a request ready, on a helper thread, without MLX; gives the error that its
            caller gets instead, if that fails.
        queue: where requests wait.

    Attributes:
        width: requests that can be in work at once.
        admission: limits and counters.
    """

    width = 1

    def __init__(
        self,
        lifecycle: Lifecycle,
        limits: QueueConfig,
        prepare: Prepare[R],
        queue: WorkQueue[Any],
    ) -> None:
        self.admission = Admission(lifecycle, limits)
        self._lifecycle = lifecycle
        self._prepare = prepare
        self._preparer: Preparer[Any] = Preparer(queue)
        self._beside = SideQueue()

    @abc.abstractmethod
    def serve(self, request: R) -> Awaitable[GenerationResult]:
        """Do a request that somebody waits for.

        Cancellation: what waits leaves the queue at once; what runs is told to stop, and its
        caller stays until it is out of MLX.
        """

    async def run_beside(self, name: str, func: Callable[[], T]) -> T:
        """Run ``func``, which needs no MLX, on a thread of the preparer: it takes no turn.

        Args:
            name: of what it does.
            func: looks at ``checkpoint`` between its steps.

        Cancellation: what waits leaves at once; what runs stops at its next ``checkpoint``, and
        its caller stays until it has.

        Raises:
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state.
            EngineBusy: too many others wait already, or it has waited too long.
            GenerationError: ``func`` has raised what is no error of ours.
        """
        entry = InFlight(self._lifecycle.new_id(name))
        work = SideWork(name, func, functools.partial(self.admission.answered, entry))
        preparing = Preparing(self._preparer, work, work.do, self._beside)
        with self.admission.ask(entry, work, self._beside):
            return await self._beside.run(work, preparing)  # type: ignore[no-any-return]

    async def run_blocking_serialized(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        _entry: InFlight | None = None,
        _prepare: Callable[[], MLXEngineError | None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Run ``func`` on the MLX thread. All work that somebody waits for goes through here.

        Takes the generation lock in the order of arrival, and holds it until ``func`` has
        returned, whatever happens to the caller meanwhile; see ``WorkQueue.run``.

        Args:
            on_cancel: called once, from any thread, if the caller is cancelled meanwhile.
            _entry: what it is in the registry; the engine's own work, if there is none.
            _prepare: done before, on a thread of the preparer; see ``Preparing``.
        """
        entry = _entry or InFlight(self._lifecycle.new_id("work"))
        job = ThreadJob(
            functools.partial(func, *args, **kwargs),
            on_cancel,
            functools.partial(self.admission.over, entry),
            lane=self.admission,
        )
        preparing = None if _prepare is None else Preparing(self._preparer, job, _prepare)
        with self.admission.enter(entry, job, mlx_thread):
            return await mlx_thread.run(job, preparing)  # type: ignore[no-any-return]

    async def run_sliced(self, name: str, begin: Callable[[], Rest[T]]) -> T:
        """Do work that begins on the MLX thread, and goes on beside it, taking turns there.

        Args:
            name: of what it does.
            begin: as for ``SlicedJob``.

        Cancellation: what has not begun leaves at once; what has, ends at its next turn or
        ``checkpoint``, and its caller stays until then.

        Raises:
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state.
            EngineBusy: too many others wait already, or it has waited too long.
            BaseException: whatever it raises.
        """
        entry = InFlight(self._lifecycle.new_id(name), counted=True)
        over = functools.partial(self.admission.over, entry)
        job: SlicedJob[T] = SlicedJob(begin, over, lane=self.admission)
        with self.admission.enter(entry, job, mlx_thread), job.on_thread(name):
            return await mlx_thread.run(job)  # type: ignore[no-any-return]


class SimpleScheduler(Scheduler[R]):
    """One request at a time, in the order of arrival: each is one job on the MLX thread.

    Args:
        lifecycle, limits, prepare: those of every ``Scheduler``.
        generate: does a prepared request, on the MLX thread.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        limits: QueueConfig,
        prepare: Prepare[R],
        generate: Callable[[R], GenerationResult],
    ) -> None:
        super().__init__(lifecycle, limits, prepare, mlx_thread)
        self._generate = generate

    def serve(self, request: R) -> Awaitable[GenerationResult]:
        """See ``Scheduler``."""
        return self.run_blocking_serialized(
            self._generate,
            request,
            on_cancel=request.cancel,
            _entry=_entry_of(request),
            _prepare=functools.partial(self._prepare, request),
        )


class BatchScheduler(Scheduler[R]):
    """Many requests at once, by continuous batching: they share jobs on the MLX thread.

    A job, or batch run, goes on until there is nothing to do, or others have waited for as long
    as they let the batch wait. Nobody waits for one: if an event loop had to ask for the next
    one, all requests would depend on that loop.

    Args:
        lifecycle, limits, prepare: those of every ``Scheduler``.
        width: requests that can be in work at once.
        run_batch: works on what is in the queue until there is nothing to do, others wait, or
            the event is set; on the MLX thread. Whatever happens, it leaves nobody waiting.

    Attributes:
        queue: requests that wait, and those in the batch.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        limits: QueueConfig,
        prepare: Prepare[R],
        width: int,
        run_batch: Callable[[BatchQueue[R], threading.Event], None],
    ) -> None:
        self.width = width
        self.queue: BatchQueue[R] = BatchQueue(width)
        super().__init__(lifecycle, limits, prepare, self.queue)
        self._run_batch = run_batch
        self._looking = threading.Lock()  # held while it is looked whether there is to be a job

    async def serve(self, request: R) -> GenerationResult:
        """See ``Scheduler``."""
        entry = _entry_of(request)
        over = functools.partial(self.admission.over, entry)
        queued = QueuedRequest(request, over, self._ensure_job)
        preparing = Preparing(self._preparer, queued, functools.partial(self._prepare, request))
        with self.admission.enter(entry, queued, self.queue):
            return await self.queue.run(queued, preparing)  # type: ignore[no-any-return]

    def _ensure_job(self) -> None:
        """See to it that a job is under way, or in the queue of the MLX thread, if needed.

        From any thread.
        """
        with self._looking:
            if self.queue.job is not None or not self.queue.pending:
                return
            try:
                self.queue.job = self._submit_job()
                return
            except MLXEngineError as error:
                gone = error
        self.queue.end_all(gone)

    def _submit_job(self) -> ThreadJob[None]:
        stop = threading.Event()
        run = functools.partial(self._run_batch, self.queue, stop)
        job = ThreadJob(run, stop.set, self._job_over, attended=False)
        mlx_thread.submit(job)
        return job

    def _job_over(self, job: PendingWork[None]) -> None:
        """A job has made way for others, or there was nothing left to do."""
        with self._looking:
            self.queue.job = None
        if isinstance(job.aborted_with, MLXEngineError):  # the MLX thread is gone
            self.queue.end_all(job.aborted_with)
        else:
            self._ensure_job()


def _entry_of(request: Schedulable) -> InFlight:
    return InFlight(request.request_id, counted=True, reported=True, max_wait=request.max_wait)
