"""An event loop that runs one callback at a time, and tells before each."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Hook = Callable[[], object]

_FOR_EVER: Final = 3600.0  # seconds


if TYPE_CHECKING:  # where what a loop need not have, such as I/O, counts as abstract
    _Loop = asyncio.SelectorEventLoop
else:
    _Loop = asyncio.AbstractEventLoop


class NothingLeftToDo(Exception):
    """A coroutine waits for something that nobody is ever going to do."""


class SteppedLoop(_Loop):
    """An event loop of single steps, each of which is one callback; it does no I/O.

    asyncio's own loop runs all callbacks that are ready before it looks up; so whoever wants
    to know what happens if a cancellation comes between two of them cannot. Here it can come
    before any step. Use it as ``asyncio.Runner(loop_factory=SteppedLoop)``, or by
    ``run_until_complete``.

    Args:
        before_step: called before each step, in the loop's thread; it may cancel tasks and
            schedule callbacks.
        when_idle: called when no callback is ready; returns whether something has happened
            since, so that it is worth to look again. With it the loop never waits: its time
            jumps to the next timer, and if there is none, ``NothingLeftToDo`` is raised.
            ``None`` waits, in real time, for timers and for other threads.

    Attributes:
        steps: callbacks that have been run.
        unhandled: contexts given to ``call_exception_handler``, in order.
    """

    def __init__(
        self, before_step: Hook | None = None, when_idle: Callable[[], bool] | None = None
    ) -> None:
        self.before_step = before_step
        self.when_idle = when_idle
        self.steps = 0
        self.unhandled: list[dict[str, Any]] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._arrived = threading.Condition()
        self._jumped = 0.0  # seconds, ahead of the clock
        self._running = self._stopping = self._closed = False
        self._task_factory: Any = None

    # Running

    def run_forever(self) -> None:
        """Run steps until ``stop`` is called, or until nothing is left that could happen."""
        self._check_open()
        if self._running:
            raise RuntimeError("this event loop runs already")
        outer = asyncio._get_running_loop()
        if outer is not None:
            raise RuntimeError("another event loop runs in this thread")
        self._running = True
        asyncio._set_running_loop(self)
        try:
            while not self._stopping:
                self._step()
        finally:
            self._running = self._stopping = False
            asyncio._set_running_loop(None)

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run steps until ``future`` is done, and return or raise its outcome."""
        self._check_open()
        task: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        task.add_done_callback(self._stop_with)
        try:
            self.run_forever()
        finally:
            task.remove_done_callback(self._stop_with)
        if not task.done():
            raise RuntimeError("the event loop was stopped before the future was done")
        return task.result()

    def _stop_with(self, future: asyncio.Future[Any]) -> None:
        self.stop()

    def stop(self) -> None:
        """End ``run_forever`` after the present step."""
        self._stopping = True

    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._running

    def is_closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    def close(self) -> None:
        """Drop all callbacks; nothing can be scheduled any more."""
        if self._running:
            raise RuntimeError("a running event loop cannot be closed")
        with self._arrived:
            self._closed = True
            self._ready.clear()
            self._timers.clear()

    async def shutdown_asyncgens(self) -> None:
        """Do nothing: no account is kept of asynchronous generators."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there is none."""

    def _step(self) -> None:
        self._take_timers()
        if not self._ready:
            if self.when_idle is None:
                self._wait()
            elif not self.when_idle():
                self._jump()
            return
        if self.before_step is not None:
            self.before_step()
        handle = self._ready.popleft()
        if handle.cancelled():
            return
        self.steps += 1
        handle._run()

    def _wait(self) -> None:
        left = min(self.next_timer - self.time(), _FOR_EVER)
        with self._arrived:
            if not self._ready and left > 0:
                self._arrived.wait(left)

    def _jump(self) -> None:
        if self._ready:
            return
        if self.next_timer == math.inf:
            raise NothingLeftToDo("no callback is ready, no timer is set, and nobody is at work")
        self.jump(self.next_timer)

    def jump(self, time: float) -> None:
        """Let its clock show ``time``, unless it is later already."""
        self._jumped += max(0.0, time - self.time())

    @property
    def next_timer(self) -> float:
        """Time of the next timer, by this loop's clock; infinity if there is none."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def _take_timers(self) -> None:
        while self.next_timer <= self.time():
            self._ready.append(heapq.heappop(self._timers)[2])

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")

    # Scheduling

    def time(self) -> float:
        """Seconds: those of ``time.monotonic`` and those that were skipped."""
        return time.monotonic() + self._jumped

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in a later step, in order."""
        self._check_open()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """``call_soon``, from any thread."""
        with self._arrived:
            handle = self.call_soon(callback, *args, context=context)
            self._arrived.notify()
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback in ``delay`` seconds."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback at a time of this loop's clock."""
        self._check_open()
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Leave it in the heap until its time."""

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        """A task in this loop."""
        self._check_open()
        if self._task_factory is not None:
            if context is not None:
                options["context"] = context
            task: asyncio.Task[T] = self._task_factory(self, coro, **options)
            if name is not None:
                task.set_name(name)
            return task
        return asyncio.Task(coro, loop=self, name=name, context=context, **options)

    def set_task_factory(self, factory: Any) -> None:
        """Set what makes tasks; ``None`` is ``asyncio.Task``."""
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        """The task factory that was set."""
        return self._task_factory

    # Errors

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody handled in ``unhandled``."""
        self.unhandled.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """As ``call_exception_handler``."""
        self.unhandled.append(context)

    def get_debug(self) -> bool:
        """``False``: asyncio's debug mode is another loop's."""
        return False

    def set_debug(self, enabled: bool) -> None:
        """Nothing changes."""
