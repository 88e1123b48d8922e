"""The MLX thread: the one thread of this process that is ever inside MLX.

Work takes turns on it, first come, first served, whichever engine, event loop or thread it
comes from. The generation lock *is* the thread being busy: a job holds it from the moment
the thread takes it up (RUNNING) until its function has returned (DONE), so there is no code
path, neither a cancellation nor an event loop that dies, on which it could be released while
the function is still inside MLX.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from mlx_engine.core.forks import NO_FORK, tell_after_fork
from mlx_engine.core.threads import start_now
from mlx_engine.core.work import PendingWork, Stage, ThreadJob, current_job
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import EngineDead, for_good

T = TypeVar("T")

_NO_LANE = object()


class MLXThread(WorkQueue[ThreadJob[Any]]):
    """A thread that runs jobs one at a time, in the order in which they were entered.

    A job that is being prepared holds up those behind it that are of its lane, no others.

    Every process has one, ``mlx_thread``; it starts with the first job and ends, after its
    exit jobs, when the interpreter does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: ThreadJob[Any] | None = None
        # What is queued, by lane, each in the order of arrival.
        self._lanes: dict[object, OrderedDict[ThreadJob[Any], None]] = {}
        self._sliced: object = _NO_LANE  # the one that has just had a slice
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._closing = False
        self.attended_seconds = 0.0  # spent on jobs that somebody waited for
        self._chores: list[Callable[[], None]] = []
        self._exit_jobs: list[Callable[[], None]] = []
        tell_after_fork(self)

    @property
    def locked(self) -> bool:
        """Whether a function is on the thread now, in other words inside MLX."""
        return self._running is not None

    @property
    def wanted(self) -> bool:
        """Whether a job is queued that could be taken up now."""
        with self._changed:
            return self._first() is not None

    @property
    def busy(self) -> bool:
        """Whether a job that enters now would have to wait, if there is none of its lane."""
        with self._changed:
            return self._running is not None or self._first() is not None

    @property
    def free(self) -> int:
        """How many of the queued jobs are about to be taken up."""
        return 0 if self.locked else 1

    def waiting_with(self, one: ThreadJob[Any]) -> int:
        """How many of the same engine are queued, ``one`` included."""
        with self._changed:
            return len(self._lanes.get(one.lane, ()))

    def is_current(self) -> bool:
        """Whether the caller is on this thread."""
        return self._thread is not None and threading.get_ident() == self._thread.ident

    def at_exit(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the thread when it ends; the job added last runs first."""
        with self._changed:
            self._exit_jobs.append(job)

    def remove_exit_job(self, job: Callable[[], None]) -> None:
        """Take back an exit job; nothing happens if there is none."""
        with self._changed:
            if job in self._exit_jobs:
                self._exit_jobs.remove(job)

    def post(self, chore: Callable[[], None]) -> None:
        """Run a short ``chore`` on the thread, soon; nobody waits for it. From any thread.

        For dropping things that must not be dropped elsewhere. Nothing happens when the
        thread has never run, or has ended.
        """
        if self._pid != os.getpid():
            return
        with self._changed:
            if self._thread is not None and not self._closing:
                self._chores.append(chore)
                self._changed.notify_all()

    def is_used_by_others(self, mine: ThreadJob[Any] | None) -> bool:
        """Whether a job other than ``mine`` is on the thread, or queued and not held up."""
        with self._changed:
            lanes = [lane for lane in self._lanes.values() if next(iter(lane)).ready]
            queued = any(job.ready and job is not mine for lane in lanes for job in lane)
            return queued or self._running not in (None, mine)

    def check_outside(self) -> None:
        """Raise ``RuntimeError`` where waiting for this thread would be waiting for ever.

        That is inside a job that is still running, by task or by thread, and in a process
        forked from one that has used MLX.
        """
        inside = current_job()
        if self.is_current() or (inside is not None and inside.running):
            raise RuntimeError(
                "this code already runs inside a job on the MLX thread, and would wait for "
                "itself for ever: call the MLX functions directly here"
            )
        self.check_fork()

    def check_fork(self) -> None:
        """Raise ``RuntimeError`` in a process forked from one that has used MLX."""
        if self._thread is not None and self._pid != os.getpid():
            raise RuntimeError(f"MLX was used before this process was forked, and {NO_FORK}")

    def after_fork(self) -> None:
        """In a fork of this process: the thread is not there, and may have held the lock."""
        self._changed = threading.Condition()

    def submit(self, job: ThreadJob[Any]) -> None:
        """Queue a job without waiting for it. From any thread, this one included.

        Raises:
            EngineDead: the interpreter is shutting down, or the thread cannot be started.
        """
        with self._changed:
            if self._closing:
                raise _ended("the MLX thread has ended, or the interpreter is shutting down")
            if self._thread is None:
                self._start()
            if job.stage is Stage.QUEUED:  # else it was aborted on its way here
                self._queue[job] = None
                self._lanes.setdefault(job.lane, OrderedDict())[job] = None
                self._changed.notify_all()

    def call(self, job: ThreadJob[T]) -> T:
        """Have an unattended job done, and wait for that, on another thread that may stand still.

        Raises:
            EngineDead: as ``submit`` does.
            BaseException: what the job raises, or ``abort`` was given.
        """
        self.submit(job)
        self.wait_for(lambda: job.stage is Stage.DONE)
        return job.outcome()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Wait, on another thread, until that is true of a job."""
        with self._changed:
            self._changed.wait_for(predicate)

    def end(self, job: ThreadJob[Any]) -> None:
        """End a job that has gone on elsewhere, if it has not ended. From any thread."""
        with self._changed:
            if job.stage is Stage.DONE or job is self._running:
                return
            job.stage = Stage.DONE
        job.announce()

    def _first(self) -> ThreadJob[Any] | None:
        """The job to take up next: of those that are first in their lanes. Under the lock."""
        heads = (next(iter(lane)) for lane in self._lanes.values())
        return min((job for job in heads if job.ready), key=self._place, default=None)

    def _place(self, job: ThreadJob[Any]) -> tuple[bool, int]:
        """Its place in the order of those that are first in their lanes."""
        return job.lane is self._sliced, job.rank[1]

    def _withdraw(self, one: PendingWork[Any]) -> None:
        super()._withdraw(one)
        self._leave_lane(one)

    def _leave_lane(self, one: PendingWork[Any]) -> None:
        name = getattr(one, "lane", None)
        lane = self._lanes.get(name)
        if lane is None:
            return
        lane.pop(one, None)  # type: ignore[call-overload]
        if not lane:
            del self._lanes[name]

    def _moved(self, one: PendingWork[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _enter(self, job: ThreadJob[Any]) -> None:
        self.check_outside()
        self.submit(job)

    def _start(self) -> None:
        # A daemon, so that the interpreter does not wait for it before it runs atexit
        # functions; ours then ends and joins it.
        thread = start_now(self._main, "mlx")
        self._pid = os.getpid()
        self._thread = thread
        atexit.register(self._close)

    def _main(self) -> None:
        try:
            self._serve()
        finally:
            self._tell_those_who_are_left()
            _call_all(list(reversed(self._exit_jobs)))

    def _tell_those_who_are_left(self) -> None:
        """There is nobody, unless the thread ends by a fault of its own."""
        with self._changed:
            self._closing = True
            waiting, running = list(self._queue), self._running
            self._running = None
            if running is not None:
                running.stage = Stage.DONE
                running.aborted_with = _ended("the MLX thread has ended")
        if running is not None:
            running.announce()
        for job in waiting:
            self.abort(job, _ended("the MLX thread has ended"))

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._first() or self._chores or self._closing)
                chores, self._chores = self._chores, []
            _call_all(chores)
            with self._changed:
                first = self._first()
                if first is None:
                    if self._closing:
                        return
                    continue
                job = self._running = first
                self._sliced = job.lane if job.is_slice else _NO_LANE
                del self._queue[job], first
                self._leave_lane(job)
                job.stage = Stage.RUNNING
            if job.orphaned:
                job.cancelled = True
            else:
                job.execute()
            with self._changed:
                self._running = None
                if job.attended or job.is_slice:
                    self.attended_seconds += job.ended - job.started
                over = not job.goes_on()
                if over:
                    job.stage = Stage.DONE
                self._changed.notify_all()
            if over:
                job.announce()
            del job  # or its result would live until the next one

    def _close(self) -> None:
        """At exit: abort all jobs, run the exit jobs, join the thread."""
        if self._thread is None or self._pid != os.getpid():
            return
        with self._changed:
            self._closing = True
            jobs = [*self._queue, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for job in jobs:
            self.abort(job, _ended("the interpreter is shutting down"))
        self._thread.join()


def _ended(reason: str) -> EngineDead:
    """The error of who wants a thread that nothing brings back."""
    return for_good(EngineDead(f"{reason}: only another process can use MLX again"))


def _call_all(jobs: list[Callable[[], None]]) -> None:
    """Call each, whatever the others do; a failure is reported as an uncaught exception."""
    for job in jobs:
        try:
            job()
        except Exception:  # noqa: BLE001 - foreign code, called by the one thread
            sys.excepthook(*sys.exc_info())
    jobs.clear()


mlx_thread = MLXThread()
