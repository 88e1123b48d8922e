"""An event loop on a thread of its own, for callers who have none and block.

caller ── call ──► task in the loop ──► over ──► caller
             │ Ctrl-C: the task is cancelled, and the caller stays until it is over
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import signal
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from threading import Condition
from types import FrameType
from typing import Any, Generic, TypeVar

from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.threads import dead, start_now

T = TypeVar("T")

new_loop = asyncio.SelectorEventLoop

_LAST = 1.0  # seconds for what goes on to end when the interpreter exits


class BlockingCall(Generic[T]):
    """A coroutine function for which a thread blocks.

    Args:
        func: called in the loop, with the context variables of the caller.
    """

    def __init__(self, func: Callable[[], Awaitable[T]]) -> None:
        self._func = func
        self._context = contextvars.copy_context()
        self._changed = Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._over = False
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._interrupt: BaseException | None = None

    def enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have it done there."""
        self._loop = loop
        loop.call_soon_threadsafe(self._begin)

    def give_up(self, error: BaseException) -> None:
        """Interrupt a call that could not be entered, or not quite."""
        self.interrupt(error)
        if self._loop is None:
            self.end()
        else:
            self.enter(self._loop)

    def interrupt(self, error: BaseException) -> None:
        """Cancel it: its caller gets ``error`` once it is over. From any thread, and from a
        signal handler; once is enough.
        """
        if self._interrupt is None:
            self._interrupt = error
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and so this is over
                self._loop.call_soon_threadsafe(self._cancel)

    def wait(self) -> None:
        """Block until it is over, whatever signal handlers raise meanwhile."""
        while not self._over:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._over)
            except BaseException as error:  # noqa: BLE001 - raised by ``outcome``
                self.interrupt(error)

    def outcome(self) -> T:
        """Return or raise what the caller gets, once it is over."""
        error = self._interrupt or self._error
        self._interrupt = self._error = None
        if error is None:
            return self._values.pop()
        try:
            raise error
        finally:
            del error  # no cycle from the traceback to this frame

    # In the loop

    def _begin(self) -> None:
        if self._over or self._task is not None:
            return
        if self._interrupt is not None:
            self.end()
            return
        assert self._loop is not None
        self._task = self._loop.create_task(self._work(), context=self._context)
        self._task.add_done_callback(self._ended)

    async def _work(self) -> T:
        return await self._func()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            self._error = task.exception()
            if self._error is None:
                self._values.append(task.result())
        self.end()

    def end(self) -> None:
        """Be over; without an outcome it was cancelled."""
        self._task = None
        if self._error is None and not self._values:
            self._error = CancelledError("the call was cancelled")
        self._over = True
        with self._changed:
            self._changed.notify_all()


class LoopThread:
    """An event loop on a daemon thread, which is started when it is first needed.

    Args:
        name: of the thread.
        is_idle: whether nobody needs the loop between two calls: then it ends with the last one.
    """

    def __init__(self, name: str, is_idle: Callable[[], bool]) -> None:
        self._name = name
        self._is_idle = is_idle
        self._lock = threading.RLock()  # a signal handler may be where this is
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: dict[BlockingCall[Any], None] = {}
        self._finalizer: weakref.finalize[Any, Any] | None = None
        tell_after_fork(self)

    def call(self, func: Callable[[], Awaitable[T]]) -> T:
        """Call and await ``func`` in the loop, and block until that is over. From any thread.

        Ctrl-C, in the main thread, and whatever else a signal handler raises there, cancels it;
        it is raised when the call is over, however often it comes.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still.
            EngineDead: the thread cannot be started.
            concurrent.futures.CancelledError: ``cancel`` was called, or ``close``.
            BaseException: whatever ``func`` raises.
        """
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "this call blocks, and an event loop runs in this thread, which would stand still: "
                "await the engine's own method there, or call from another thread, as with "
                "'await asyncio.to_thread(...)'"
            )
        call = BlockingCall(func)
        with _ctrl_c(call):
            try:
                self._enter(call)
            except BaseException as error:  # noqa: BLE001 - raised by ``outcome``
                call.give_up(error)
            call.wait()
            self._leave(call)
        return call.outcome()

    def cancel(self) -> None:
        """Cancel the calls under way. From any thread; returns at once."""
        for call in list(self._calls):
            call.interrupt(CancelledError("the call was cancelled"))

    def close(self) -> None:
        """End the loop, and what is left in it. It is started anew if it is needed again."""
        with self._lock:
            self._end()

    def after_fork(self) -> None:
        """In a fork of this process: the thread is not there, nor are those who wait."""
        self._lock = threading.RLock()
        self._forget()
        self._calls = {}

    def _enter(self, call: BlockingCall[Any]) -> None:
        with self._lock:
            if self._loop is None:
                self._start()
            assert self._loop is not None
            self._calls[call] = None
            call.enter(self._loop)

    def _leave(self, call: BlockingCall[Any]) -> None:
        with self._lock:
            self._calls.pop(call, None)
            if not self._calls and self._is_idle():
                self._end()

    def _start(self) -> None:
        try:
            loop = new_loop()
        except OSError as error:
            raise dead("an event loop cannot be made", error) from error
        try:
            self._thread = start_now(lambda: _run(loop), self._name)
        except BaseException:
            loop.close()
            raise
        self._loop = loop
        self._finalizer = weakref.finalize(self, _stop, loop)  # one that is forgotten ends
        self._finalizer.atexit = False  # there is time for its end then: ``_end_all``
        _running.add(self)

    def _end(self) -> None:
        """Under the lock. Those who wait are told by ``_run``."""
        loop, thread = self._loop, self._thread
        self._forget()
        if loop is None or thread is None:
            return
        _stop(loop)
        if thread is not threading.current_thread():
            thread.join()

    def _forget(self) -> None:
        self._loop = self._thread = None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    def end_at_exit(self) -> None:
        """End the loop so that nothing runs while the interpreter is torn down."""
        loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            _stop(loop)
            thread.join(_LAST)


@contextlib.contextmanager
def _ctrl_c(call: BlockingCall[Any]) -> Iterator[None]:
    """Within, Ctrl-C interrupts the call, where it would raise KeyboardInterrupt anywhere.

    Other handlers stay as they are: what they raise, they raise in ``BlockingCall.wait``.
    """
    default = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not default:
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        call.interrupt(KeyboardInterrupt())

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # closed already
        loop.call_soon_threadsafe(loop.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop on its thread until it is stopped, and then what is left in it to its end."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _end_all() -> None:
    for one in list(_running):
        one.end_at_exit()


_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()

atexit.register(_end_all)
