"""Threads that are started without waiting for one that never comes.

``Thread.start`` waits until the thread says that it runs. When memory is short, a thread may be
made and end before it can say so, and that wait never ends. So it is made on a thread of its
own, which may wait; whoever wants the thread is told if there is none, and gives up in time.
"""

from __future__ import annotations

import _thread
import asyncio
import errno
import threading
from collections.abc import Callable
from typing import TypeVar

from mlx_engine.errors import EngineDead

T = TypeVar("T")

START_LIMIT = 10.0  # seconds until a thread that says nothing is given up
_TICKS = 10  # in which they are counted: a machine that slept was not waiting

_WANTS = (RuntimeError, MemoryError, TimeoutError)  # what a thread that cannot be had raises
_WHAT = "a thread cannot be started"


class Start:
    """A thread on its way, once ``begin`` is called.

    Args:
        target: what it is to do. Never called once the thread has been given up.
        failed: called at most once, from any thread, if ``target`` never will be called.
        daemon: whether the interpreter's exit does not wait for it.
    """

    def __init__(
        self,
        target: Callable[[], object],
        name: str,
        failed: Callable[[EngineDead], object],
        *,
        daemon: bool = True,
    ) -> None:
        self._target = target
        self._failed = failed
        self._lock = threading.Lock()
        self._pending = True
        self.thread = threading.Thread(target=self._run, name=name, daemon=daemon)

    @property
    def pending(self) -> bool:
        """Whether the thread neither runs nor has been given up. From any thread."""
        return self._pending

    def begin(self) -> None:
        """Start the thread, without waiting for it.

        Raises:
            EngineDead: that much is known at once; ``failed`` is not called then.
        """
        try:
            _thread.start_new_thread(self._start, ())
        except (RuntimeError, MemoryError) as error:
            self._settle()
            raise dead(_WHAT, error) from error

    def limit(self) -> StartLimit:
        """Have it given up after 10 s, by timers of the running event loop: to be cancelled."""
        return StartLimit(self.give_up)

    def give_up(self) -> None:
        """Do without the thread, unless it runs by now. From any thread."""
        self._fail(TimeoutError("it did not come to run"))

    def _start(self) -> None:
        try:
            self.thread.start()
        except BaseException as error:  # noqa: BLE001 - it is told to whoever waits
            self._fail(error)

    def _run(self) -> None:
        if self._settle():
            self._target()

    def _fail(self, error: BaseException) -> None:
        if self._settle():
            self._failed(dead(_WHAT, error))

    def _settle(self) -> bool:
        """Whether it was pending until now."""
        with self._lock:
            pending, self._pending = self._pending, False
            return pending


class StartLimit:
    """Seconds until a thread is given up, counted in the running event loop.

    One timer of 10 s would be over at once after a pause of the whole process, of a laptop's lid
    or a virtual machine, and the thread, which had no time either, be given up for nothing.
    """

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up = give_up
        self._left = _TICKS
        self._tick()

    def cancel(self) -> None:
        """Count no further."""
        self._timer.cancel()

    def _tick(self) -> None:
        if self._left:
            self._left -= 1
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(START_LIMIT / _TICKS, self._tick)
        else:
            self._give_up()


def start_now(target: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread, and wait until it runs, for 10 s at most.

    Raises:
        EngineDead: there is none, and ``target`` never will be called.
    """
    settled = threading.Event()
    errors: list[EngineDead] = []

    def run() -> None:
        settled.set()
        target()

    def failed(error: EngineDead) -> None:
        errors.append(error)
        settled.set()

    start = Start(run, name, failed)
    start.begin()
    if not any(settled.wait(START_LIMIT / _TICKS) for _ in range(_TICKS)):
        start.give_up()
    if errors:
        raise errors[0]
    return start.thread


def in_thread(func: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Call ``func`` on a daemon thread; a future of the running event loop with its outcome.

    Cancelling the future stops nothing: the function goes on to its end, for nobody. If no
    thread can be had, for 10 s, the outcome is ``EngineDead``.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        limit.cancel()
        if future.done():
            return
        if error is None:
            future.set_result(value)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def soon(value: T | None, error: BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(tell, value, error)
        except RuntimeError:
            pass  # its loop is closed: nobody is left to be told

    def run() -> None:
        try:
            value = func()
        except BaseException as error:  # noqa: BLE001 - the border: whoever waits raises it
            soon(None, error)
        else:
            soon(value, None)

    start = Start(run, name, lambda error: soon(None, error))
    limit = start.limit()
    try:
        start.begin()
    except EngineDead as error:
        tell(None, error)
    return future


def dead(what: str, error: BaseException) -> EngineDead:
    """``what`` has failed for want of something: an error that says of what, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        advice = "close some files, or raise the limit (ulimit -n)"
    elif isinstance(error, _WANTS) or number in (errno.EAGAIN, errno.ENOMEM):
        advice = (
            "the limit of memory, threads or processes is reached (ulimit -v, ulimit -u, or that "
            "of a container); end something, or raise it"
        )
    else:
        advice = ""
    said = str(error) or type(error).__name__
    told = EngineDead(f"{what}: {said}" + (f": {advice}, and start again" if advice else ""))
    told.__cause__ = error
    return told
