"""Time limits for work in a thread of its own, and for each part of it."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")

_LOOK: Final = 0.05  # seconds between two looks
_GRACE: Final = 5.0  # seconds in which the work may end after it was told to


class Hang(Exception):
    """Something did not come to its end in time.

    Attributes:
        stacks: of all threads and of the event loop's tasks, at that moment.
    """

    def __init__(self, message: str, stacks: str) -> None:
        super().__init__(message)
        self.stacks = stacks


@dataclass(frozen=True)
class _Watch:
    what: str
    seconds: float
    end: float
    loop: asyncio.AbstractEventLoop | None
    let_go: Callable[[], object] | None


class Timeouts:
    """Runs work in a thread, and breaks off what takes longer than it may.

    Attributes:
        leaving: set when the work should end early, because nobody wants it any more.
    """

    def __init__(self) -> None:
        self.leaving = threading.Event()
        self._lock = threading.Lock()
        self._watch: _Watch | None = None
        self._hang: Hang | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` in a thread, and return or raise its outcome; to be called once.

        Raises:
            Hang: the thread itself is stuck, and has been left behind.
        """
        outcome = Future[T]()

        def call() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised in the other thread
                outcome.set_exception(error)

        thread = threading.Thread(target=call, name="cancellation check", daemon=True)
        thread.start()
        try:
            while not wait([outcome], _LOOK).done:
                self._look(outcome)
        except Hang:
            raise
        except BaseException:  # Ctrl-C
            self.leaving.set()
            wait([outcome], _GRACE)
            raise
        thread.join()
        return outcome.result()

    @contextmanager
    def within(
        self,
        seconds: float,
        what: str,
        loop: asyncio.AbstractEventLoop | None = None,
        let_go: Callable[[], object] | None = None,
    ) -> Iterator[None]:
        """The block is to take so long at most. In the work's thread.

        Args:
            what: what it does, as a sentence begins.
            loop: the event loop in which it does that.
            let_go: ends the block, if it can be ended; from any thread.

        Raises:
            Hang: it has taken longer.
        """
        end = time.monotonic() + seconds if seconds < math.inf else math.inf
        self._watch = _Watch(what, seconds, end, loop, let_go)
        try:
            yield
        finally:
            with self._lock:
                self._watch = None
                hang, self._hang = self._hang, None
            if hang is not None:
                raise hang

    def _look(self, outcome: Future[Any]) -> None:
        watch = self._watch
        if watch is None or time.monotonic() < watch.end:
            return
        problem = f"{watch.what} has not come to its end in {watch.seconds:.0f} s"
        hang = Hang(problem, _stacks(watch))
        with self._lock:
            if self._watch is not watch:
                return  # it has, just now
            self._hang = hang
        if watch.let_go is not None:
            watch.let_go()
        end = time.monotonic() + _GRACE
        while self._watch is watch and not wait([outcome], _LOOK).done:
            if time.monotonic() > end:
                raise hang


def _stacks(watch: _Watch) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    for task in asyncio.all_tasks(watch.loop) if watch.loop is not None else ():
        frames = [line for at in _frames(task.get_coro()) for line in traceback.format_stack(at, 1)]
        parts.append(f"task {task.get_name()}:\n{''.join(frames)}")
    return "\n".join(parts)


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """Frames of a coroutine, of the one that it awaits, and so on."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield frame
        coroutine = coroutine.cr_await
