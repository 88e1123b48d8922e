"""A run of an operation in which every interleaving of event loop and threads is chosen."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mlx_engine.chat.renderer import Renderer
from mlx_engine.core import bridge, loop_thread, preparer, sliced_job
from mlx_engine.core.admission import Admission
from mlx_engine.core.batch_queue import BatchQueue
from mlx_engine.core.channel import Channel
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.request import ActiveRequest
from mlx_engine.core.work import PendingWork, Stage, ThreadJob
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.engine import batch_holder
from mlx_engine.generation.chat_places import EncodedText
from mlx_engine.remote.calls import Call
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.testing.safety.stepped_loop import SteppedLoop
from mlx_engine.testing.safety.ways import LoopShutdown, Way
from tests.guard import GUARD
from tests.sweep.driver import DrivenCondition, Driver
from tests.sweep.scene import Scene, Schedule

_WHO: contextvars.ContextVar[str] = contextvars.ContextVar("_WHO", default="")
_MOST = 20_000  # moments of a run; more is a loop without end
_FAIR = 8  # steps of the loop after which a thread is let go, whatever the schedule
_LOOK = 1e-4  # seconds that pass with each look at the clock
_COLLECT = 16  # runs between two times at which garbage is collected in any case
_MOST_JUMPS = 200  # of the time, in a run; more is a wait without end

_JOINTS = (
    (ThreadJob, "execute"),
    (PendingWork, "announce"),
    (Admission, "over"),
    (Channel, "push"),
    (BatchQueue, "take"),
    (BatchQueue, "end"),
    (WorkQueue, "refuse"),
    (WorkQueue, "take_to_prepare"),
    (Renderer, "render"),
    (EncodedText, "__init__"),
    (ActiveRequest, "fit"),
    (WorkQueue, "left"),
)


class Broken(AssertionError):
    """An invariant does not hold."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


@dataclass
class _Run:
    """What happens in one run."""

    draw: random.Random
    schedule: Schedule
    way: Way[Any]
    strike_at: int
    moment: int = 0
    waited: int = 0  # steps of the loop since a thread was let go
    jumps: int = 0
    pendings: list[tuple[str, weakref.ref[PendingWork[Any]]]] = field(default_factory=list)
    model_calls: int = 0
    told: dict[int, int] = field(default_factory=dict)  # pending -> model calls by then
    late: int = 0  # the most model calls between being told to stop and having stopped
    over: bool = False
    problem: BaseException | None = None

    @property
    def closed(self) -> bool:
        """Whether its event loop was closed under it."""
        return isinstance(self.way, LoopShutdown) and self.way.closes and self.way.struck


class Simulation:
    """Drives the MLX thread and all others, and plays scenes.

    Attributes:
        runs: scenes played, over all simulations.
    """

    runs = 0

    def __init__(self) -> None:
        self.driver = Driver()
        self._run: _Run | None = None
        self._now = 0.0  # seconds, by the clock that measures work
        self._inside: list[ThreadJob[Any]] = []
        self._loops: list[SteppedLoop] = []  # of threads: that of I/O, and those of fronts
        self._io_loop = self._loop_of_a_thread()

    @contextmanager
    def installed(self) -> Iterator[Simulation]:
        """Within, threads advance only when they are told to.

        Clocks go on with each look at them, and garbage is collected only when that is said, so
        that neither a busy machine nor what ran before makes a difference.
        """
        asyncio.run(_start_mlx_thread())
        condition, driven = mlx_thread._changed, DrivenCondition(self.driver)
        start, io_loop, io_pid = bridge.Start, io_thread._loop, io_thread._pid
        undo_joints, undo_watch = self.driver.joints(*_JOINTS), self._watch()
        bridge.Start = preparer.Start = sliced_job.Start = self._start  # type: ignore[assignment,misc]
        gather, batch_holder._GATHER = batch_holder._GATHER, 0.0  # nobody else goes on meanwhile
        linger, preparer._LINGER = preparer._LINGER, 0.0
        io_thread._loop, io_thread._pid = self._io_loop, os.getpid()
        undo_fronts = self._drive_fronts()
        self.driver.start(self._io_loop.run_forever, "I/O")

        def swap() -> None:
            mlx_thread._changed = driven

        self.driver.take(mlx_thread.post, swap)
        GUARD.hook = self._entered
        undo_clock = self._own_clock()
        gc.disable()
        try:
            yield self
            gc.collect()
            require(not self._io_loop.unhandled, f"nobody handled {self._io_loop.unhandled}")
        finally:
            gc.enable()
            undo_clock()
            GUARD.hook = None
            self.driver.quick = True
            self.driver.settle()
            self._io_loop.call_soon(self._io_loop.stop)
            mlx_thread._changed = condition
            mlx_thread.post(self.driver.release)
            self.driver.settle()
            self._io_loop.close()
            self.driver.close()
            io_thread._loop, io_thread._pid = io_loop, io_pid
            undo_fronts()
            bridge.Start = preparer.Start = sliced_job.Start = start  # type: ignore[misc]
            batch_holder._GATHER = gather
            preparer._LINGER = linger
            undo_watch()
            undo_joints()

    def _start(
        self, target: Callable[[], object], name: str, failed: object, *, daemon: bool = True
    ) -> Any:
        return SimpleNamespace(
            pending=False,
            begin=lambda: self.driver.start(target, name),
            give_up=lambda: None,
            limit=lambda: SimpleNamespace(cancel=lambda: None),
        )

    def _loop_of_a_thread(self) -> SteppedLoop:
        """An event loop for a thread that is driven, which pauses before each step."""

        def has_work() -> bool:
            return bool(loop._ready) or loop.next_timer <= loop.time()

        loop = SteppedLoop(
            lambda: self.driver.pause("step"), lambda: self.driver.pause("idle", has_work) or True
        )
        self._loops = [one for one in self._loops if not one.is_closed()] + [loop]
        return loop

    def _drive_fronts(self) -> Callable[[], None]:
        """Drive the threads of those who do without await; gives what undoes that."""
        before = loop_thread.new_loop, loop_thread.start_now, loop_thread.Condition

        def start_now(target: Callable[[], object], name: str) -> Any:
            over: list[bool] = []
            self.driver.start(lambda: over.append(bool(target())), name)
            return SimpleNamespace(join=lambda *_: self.driver.pause("join", lambda: over))

        loop_thread.new_loop = self._loop_of_a_thread  # type: ignore[assignment]
        loop_thread.start_now = start_now
        loop_thread.Condition = lambda: DrivenCondition(self.driver)  # type: ignore[misc,assignment]

        def undo() -> None:
            loop_thread.new_loop, loop_thread.start_now, loop_thread.Condition = before  # type: ignore[misc]

        return undo

    def _own_clock(self) -> Callable[[], None]:
        """Replace the clocks for what is driven here; gives what undoes that.

        By ``time.perf_counter`` work is measured, as the schedule says; ``time.monotonic`` is for
        all that waits.
        """
        real_work, real, here = time.perf_counter, time.monotonic, threading.get_ident()
        now, me, drives = real(), threading.get_ident, self.driver.drives

        def work() -> float:
            if (thread := me()) != here and not drives(thread):
                return real_work()
            run = self._run
            self._now += 1e-4 if run is None else run.schedule.passes(run.draw)
            return self._now

        def look() -> float:
            nonlocal now
            if (thread := me()) != here and not drives(thread):
                return real()
            now += _LOOK
            return now

        def undo() -> None:
            time.perf_counter, time.monotonic = real_work, real

        time.perf_counter, time.monotonic = work, look
        return undo

    def _watch(self) -> Callable[[], None]:
        """Note what is made, who is inside, and who is told to stop; gives what undoes that."""
        init, execute = PendingWork.__init__, ThreadJob.execute
        take, announce = PendingWork.take_on_cancel, PendingWork.announce

        def noted_init(pending: PendingWork[Any], *args: Any, **kwargs: Any) -> None:
            init(pending, *args, **kwargs)
            if self._run is not None:
                self._run.pendings.append((_WHO.get(), weakref.ref(pending)))

        def noted_execute(turn: ThreadJob[Any]) -> None:
            if not mlx_thread.is_current():  # of another thread, for work that is not MLX's
                execute(turn)
                return
            self._inside.append(turn)
            try:
                execute(turn)
            finally:
                self._inside.remove(turn)

        def noted_take(pending: PendingWork[Any]) -> Any:
            here = not isinstance(pending, Call)  # what is elsewhere has still to be told
            if self._run is not None and pending.stage is Stage.RUNNING and here:
                self._run.told.setdefault(id(pending), self._run.model_calls)
            return take(pending)

        def noted_announce(pending: PendingWork[Any]) -> None:
            run = self._run
            if run is not None and (told := run.told.pop(id(pending), None)) is not None:
                run.late = max(run.late, run.model_calls - told)
            announce(pending)

        PendingWork.__init__ = noted_init  # type: ignore[method-assign]
        PendingWork.take_on_cancel = noted_take  # type: ignore[method-assign]
        PendingWork.announce = noted_announce  # type: ignore[method-assign]
        ThreadJob.execute = noted_execute  # type: ignore[method-assign]

        def undo() -> None:
            PendingWork.__init__ = init  # type: ignore[method-assign]
            PendingWork.take_on_cancel = take  # type: ignore[method-assign]
            PendingWork.announce = announce  # type: ignore[method-assign]
            ThreadJob.execute = execute  # type: ignore[method-assign]

        return undo

    def _entered(self, name: str) -> None:
        """On the MLX thread: it enters MLX."""
        if name in ("model", "head"):
            if self._run is not None:
                self._run.model_calls += 1
            self.driver.pause(name)

    # A run

    def play(
        self, scene: Scene, way: Way[Any], schedule: Schedule, strike_at: int = 0, seed: int = 0
    ) -> int:
        """Run a scene once.

        Args:
            strike_at: the moment at which ``way`` strikes, from 1; 0 is never.

        Returns:
            How many moments there were while the operation was under way.

        Raises:
            Broken: an invariant does not hold.
        """
        Simulation.runs += 1
        self.driver.quick = True
        scene.reset()
        self.driver.quick = False
        run = self._run = _Run(random.Random(seed), schedule, way, strike_at)
        loop = SteppedLoop(self._before_step, self._when_idle)
        try:
            self._play(scene, run, loop)
            if run.problem is not None:
                raise run.problem
        finally:
            self._run = None
            self.driver.quick = True
        self._check_idle(scene, run)
        # An engine whose loop was closed while it started or stopped is in the middle of that
        # until it is used again.
        if not (scene.lives and run.closed):
            self._check_nothing_is_left(scene, run)
        if scene.probe is not None:
            self.in_a_loop(scene.probe)
            scene.rested()
        self._check_nothing_is_left(scene, run)
        return run.moment

    def in_a_loop(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """What ``work`` gives in an event loop of its own, in which nothing is chosen."""
        quick, self.driver.quick = self.driver.quick, True
        loop = SteppedLoop(None, self._when_idle)
        try:
            result = loop.run_until_complete(work())
            self._finish(loop)
        finally:
            loop.close()
            self.driver.quick = quick
        return result

    def on_mlx_thread(self, chore: Callable[[], None]) -> None:
        """Call a function there, now."""
        mlx_thread.post(chore)
        self.driver.settle()

    def _play(self, scene: Scene, run: _Run, loop: SteppedLoop) -> None:
        main = loop.create_task(self._main(scene, run))
        main.add_done_callback(loop._stop_with)
        loop.run_forever()
        main.remove_done_callback(loop._stop_with)
        if main.done():
            main.result()
        elif run.closed:
            loop.close()
            del main
            run.way.forget()
            self._destroy_tasks(loop)
            self._pass_time(3)
            self._destroy_tasks(loop)
            return
        else:
            tasks = sorted(asyncio.all_tasks(loop), key=_in_order)
            run.draw.shuffle(tasks)  # nothing is said about whose turn is first
            for task in tasks:
                task.cancel()
            loop.run_until_complete(_all(tasks))
            if not main.cancelled():
                main.result()
                raise Broken("I4: the end of the event loop was swallowed")
        self._finish(loop)
        loop.close()

    def _destroy_tasks(self, loop: SteppedLoop) -> None:
        """Those of a closed loop, of which it is told; and so are those that they held."""
        gc.collect()
        while loop.unhandled:
            loop.unhandled.clear()
            gc.collect()

    def _finish(self, loop: SteppedLoop) -> None:
        """Let everything come to rest, and see that nothing is left in the event loop."""
        self.driver.settle()
        asyncio._set_running_loop(loop)  # which anyio's callbacks ask for
        try:
            while loop._ready:
                loop._step()
        finally:
            asyncio._set_running_loop(None)
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        require(not left, f"I6: tasks are left: {left}")
        require(not loop.unhandled, f"nobody handled {loop.unhandled}")

    def _pass_time(self, seconds: float) -> None:
        """Time goes by for the I/O loop."""
        end = self._io_loop.time() + seconds
        self.driver.settle()
        while (timer := self._io_loop.next_timer) <= end:
            self._io_loop.jump(timer)
            self.driver.settle()

    async def _main(self, scene: Scene, run: _Run) -> None:
        async def operation() -> Any:
            _WHO.set("operation")
            try:
                return await scene.operate()
            finally:
                _WHO.set("")
                self._operation_over(run)

        beside = None
        if scene.beside is not None:
            beside = asyncio.create_task(_call(scene.beside, after=0 if scene.behind else 2))
            await asyncio.sleep(0)
        result = await run.way.run(operation)
        if result is not None or not run.way.struck:
            if scene.expected is None:
                scene.expected = result
            require(result == scene.expected, f"it gave {result!r}, not {scene.expected!r}")
        if beside is not None:
            await beside

    def _operation_over(self, run: _Run) -> None:
        """I2: whoever has asked for something is told when it is out of MLX, and not before."""
        if run.over:
            return
        run.over = True
        if run.closed:
            return  # it is being destroyed; nobody goes on
        for who, ref in run.pendings:
            pending = ref()
            if who == "operation" and pending is not None and pending.attended:
                if pending in self._inside:
                    run.problem = Broken("I2: the caller goes on while its work is inside MLX")
                elif pending.stage is Stage.RUNNING or pending.preparing:
                    run.problem = Broken("I2: the caller goes on while its work is under way")

    # Moments

    def _before_step(self) -> None:
        run = self._run
        if run is None:
            return
        run.waited += 1
        for _ in range(max(run.schedule.advances(run.draw), run.waited // _FAIR)):
            if not self._advance():
                break
        self._moment()

    def _when_idle(self) -> bool:
        return self._advance() or self._jump()

    def _advance(self) -> bool:
        """Something happens on a thread, or before that in the event loop; whether it did."""
        if not self.driver.can_advance:
            return False
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SteppedLoop)
        ready = len(loop._ready)
        self._moment()
        run = self._run
        if len(loop._ready) == ready or run is None or run.waited >= _FAIR:
            if run is not None:
                run.waited = 0
            draw = run.draw if run is not None and run.schedule.per_step is None else None
            self.driver.advance(draw)
        return True

    def _moment(self) -> None:
        """Something is about to happen."""
        run = self._run
        if run is None:
            return
        self._check_now()
        run.moment += not run.over
        require(run.moment < _MOST, "it does not come to an end")
        if run.over or not run.strike_at:
            return
        if run.moment == run.strike_at or (run.way.repeats and run.moment > run.strike_at):
            run.way.strike()

    def _jump(self) -> bool:
        """Nobody has anything to do: time goes on to the next timer of a thread's loop."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SteppedLoop)
        others = [one for one in self._loops if not one.is_closed()]
        other = min(others, key=lambda one: one.next_timer - one.time())
        timer = other.next_timer
        if timer - other.time() >= loop.next_timer - loop.time():
            return False
        if self._run is not None:
            self._run.jumps += 1
            require(self._run.jumps < _MOST_JUMPS, "I4: it waits for something that never comes")
        other.jump(timer)
        return True

    def _check_now(self) -> None:
        if self._inside:
            require(mlx_thread.locked, "I2: the lock is free while a function is inside")
            require(len(self._inside) == 1, "I1: two functions at once")
            stage = self._inside[0].stage
            if stage is not Stage.RUNNING:
                raise Broken(f"I2: its stage is {stage} while inside")
        if GUARD.violations:
            raise Broken(f"I1: {GUARD.violations}")

    def _check_idle(self, scene: Scene, run: _Run) -> None:
        require(not GUARD.violations, f"I1: {GUARD.violations}")
        require(not mlx_thread.locked, "I2: the MLX thread is still at work")
        require(run.late <= scene.late, f"I3: {run.late} model calls after it should stop")
        require(mlx_thread.waiting == 0, "I6: turns are left in the queue")
        require(not self._io_loop.unhandled, f"nobody handled {self._io_loop.unhandled}")

    def _check_nothing_is_left(self, scene: Scene, run: _Run) -> None:
        scene.rested()
        run.way.forget()
        left = self._alive(run)
        if left:  # by a timer, perhaps, that looks whether anybody still waits
            self._pass_time(3)
            left = self._alive(run)
        require(not left, f"I6: requests are kept alive: {left}")

    def _alive(self, run: _Run) -> list[str]:
        """Who keeps what a request was; garbage is collected where that makes a difference."""
        if self.runs % _COLLECT == 0 or any(ref() is not None for _, ref in run.pendings):
            gc.collect()
        return [who or "beside" for who, ref in run.pendings if ref() is not None]


async def _call(work: Callable[[], Awaitable[Any]], after: int) -> Any:
    for _ in range(after):
        await asyncio.sleep(0)
    return await work()


def _in_order(task: asyncio.Task[Any]) -> tuple[int, str]:
    """By name; among those that are alike, by number."""
    return len(task.get_name()), task.get_name()


async def _all(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _start_mlx_thread() -> None:
    await mlx_thread.run(ThreadJob(lambda: None))
