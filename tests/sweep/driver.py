"""Threads that advance when they are told to, from one pause to the next.

The code under test runs unchanged, on its own threads; at its joints (taking up work, entering
MLX, finishing, telling) the threads stop until the test lets them go on. So a test chooses how
the event loop and the threads interleave, and the same choices give the same run.
"""

from __future__ import annotations

import contextvars
import functools
import random
import threading
from collections.abc import Callable
from typing import Any

_PATIENCE = 90  # seconds in which a thread must come to its next pause

Ready = Callable[[], object]


class Stuck(AssertionError):
    """A thread does not come to its next pause: it waits for something that it should not."""


class _Driven:
    """One thread, as its driver sees it."""

    def __init__(self) -> None:
        self.at = ""
        self.ready: Ready | None = None
        self.over = False
        self._go = threading.Lock()
        self._stopped = threading.Lock()
        self._go.acquire()
        self._stopped.acquire()

    def stop(self, at: str, ready: Ready | None) -> None:
        """On the thread."""
        self.at, self.ready = at, ready
        self._stopped.release()
        self._go.acquire()

    def end(self) -> None:
        """On the thread."""
        self.over = True
        self._stopped.release()

    def can_go(self) -> bool:
        return not self.over and (self.ready is None or bool(self.ready()))

    def go(self) -> None:
        self._go.release()
        self.wait()

    def wait(self) -> None:
        if not self._stopped.acquire(timeout=_PATIENCE):
            raise Stuck(f"after {self.at!r}")


class _Spare:
    """A thread that does one job after another: to start one takes longer than most jobs do.

    Args:
        idle: where it puts itself whenever it has none.
    """

    def __init__(self, idle: list[_Spare]) -> None:
        self._idle = idle
        self._job: Callable[[], object] | None = None
        self._given = threading.Lock()
        self._given.acquire()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], object], name: str) -> None:
        """Do a job, as a thread of this name would that is new."""
        self._job, self._thread.name = job, name
        self._given.release()

    def end(self) -> None:
        """End the thread once its job is over."""
        self._given.release()
        self._thread.join(_PATIENCE)

    def _serve(self) -> None:
        while True:
            self._given.acquire()
            if self._job is None:
                return
            contextvars.Context().run(self._job)
            self._job = None
            self._idle.append(self)


class Driver:
    """The threads that are driven, in the order in which they came.

    Attributes:
        quick: whether pauses at joints are left out, so that a thread goes on until it has
            nothing to do.
    """

    def __init__(self) -> None:
        self._threads: dict[int, _Driven] = {}
        self._spares: list[_Spare] = []
        self._idle: list[_Spare] = []
        self.quick = False

    def drives(self, thread: int) -> bool:
        """Whether the thread of this identity is driven."""
        return thread in self._threads

    def pause(self, at: str, ready: Ready | None = None) -> None:
        """Stop here, if this is a driven thread, until told to go on.

        Args:
            ready: whether there is any sense in going on; ``None``: always.
        """
        me = self._threads.get(threading.get_ident())
        if me is not None and not (self.quick and ready is None):
            me.stop(at, ready)

    def adopt(self, thread: _Driven) -> None:
        """From now on this thread is driven. On the thread."""
        self._threads[threading.get_ident()] = thread

    def release(self) -> None:
        """This thread is not driven any more. On the thread."""
        self._threads.pop(threading.get_ident()).end()

    def start(self, target: Callable[[], object], name: str) -> None:
        """Start a thread that is driven from its first moment to its last."""
        driven = _Driven()

        def run() -> None:
            nonlocal target
            self.adopt(driven)
            self.pause("start")
            try:
                target()
            finally:
                # Its driver goes on while it unwinds: on a busy machine for long, holding this.
                del target
                self.release()

        if not self._idle:
            self._spares.append(_Spare(self._idle))
            self._idle.append(self._spares[-1])
        self._idle.pop().do(run, name)
        driven.wait()

    def close(self) -> None:
        """End the threads that were started, each once its job is over."""
        for spare in self._spares:
            spare.end()

    def take(self, post: Callable[[Callable[[], None]], None], then: Callable[[], None]) -> None:
        """Drive a thread that runs already, and to which functions can be posted.

        Args:
            then: called on it first; it sees to it that the thread pauses when it is idle.
        """
        driven = _Driven()

        def taken() -> None:
            self.adopt(driven)
            then()

        post(taken)
        driven.wait()

    @property
    def can_advance(self) -> bool:
        """Whether any thread has anything to do."""
        return any(map(_Driven.can_go, self._threads.values()))

    def advance(self, draw: random.Random | None = None) -> bool:
        """Let a thread that has anything to do go to its next pause; whether there was one.

        Args:
            draw: chooses which; ``None`` takes the first.
        """
        threads = list(filter(_Driven.can_go, self._threads.values()))
        if not threads:
            return False
        (threads[0] if draw is None else draw.choice(threads)).go()
        return True

    def settle(self) -> None:
        """Let all go on until none has anything to do."""
        while self.advance():
            pass

    def joints(self, *places: tuple[Any, str]) -> Callable[[], None]:
        """Pause before and after methods, given as (class, name); returns what undoes that."""
        originals = [(kind, name, getattr(kind, name)) for kind, name in places]
        for kind, name, original in originals:
            setattr(kind, name, self._jointed(original, f"{kind.__name__}.{name}"))

        def undo() -> None:
            for kind, name, original in originals:
                setattr(kind, name, original)

        return undo

    def _jointed(self, method: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def jointed(*args: Any, **kwargs: Any) -> Any:
            self.pause(f"before {label}")
            try:
                return method(*args, **kwargs)
            finally:
                self.pause(f"after {label}")

        return jointed


class DrivenCondition(threading.Condition):
    """A condition whose waits on a driven thread are pauses."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        while not (result := predicate()):
            self.release()
            try:
                self._driver.pause("idle", predicate)
            finally:
                self.acquire()
        return result
