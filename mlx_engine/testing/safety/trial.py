"""One operation in an event loop of its own, cancelled at one moment."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from mlx_engine.errors import describe
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.operations import Order
from mlx_engine.testing.safety.stepped_loop import SteppedLoop
from mlx_engine.testing.safety.timeouts import Timeouts
from mlx_engine.testing.safety.ways import CancelOnce, Dishonest, LoopShutdown, Way, Work

_AHEAD: Final = 2  # steps that whoever comes first has
_REST: Final = 10.0  # seconds in which what is left in an event loop may end by itself
_LOOK: Final = 0.002  # seconds


@dataclass(frozen=True)
class Moment:
    """The moment at which to strike.

    Attributes:
        step: before this step of the event loop, counted from 1; 0 is at ``share``.
        share: of the time that the operation takes unharmed.
    """

    step: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}" if self.step else f"{self.share:.0%}"

    @classmethod
    def parse(cls, text: str) -> Moment | None:
        """The moment that has this name; ``None`` if none has."""
        step, share = text.removeprefix("step "), text.removesuffix("%")
        if step != text and step.isdecimal() and int(step):
            return cls(step=int(step))
        if share != text and share.isdecimal():
            return cls(share=int(share) / 100)
        return None


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a trial.

    Attributes:
        steps: of the event loop, while the operation was under way.
        seconds: that the operation took.
        struck: whether it was cancelled.
        latency: seconds from then until its caller was told; ``None`` if nobody was.
        gave: what the operation gave; ``None`` if it was cancelled.
        accompanied: whether what went on beside it came to its end.
    """

    steps: int
    seconds: float
    struck: bool
    latency: float | None
    gave: Any
    accompanied: bool


class Trial:
    """Plays an operation once, in real time.

    Args:
        way: how to strike; unharmed without a moment.
        moment: when.
        expected: seconds that the operation takes unharmed.
    """

    def __init__(
        self, way: Way[Any] | None = None, moment: Moment | None = None, expected: float = 0.0
    ) -> None:
        self._way: Way[Any] = way or CancelOnce()
        self._moment = moment or Moment()
        self._armed = moment is not None
        self._expected = expected
        self._loop = SteppedLoop(self._before_step)
        self._caller: asyncio.Task[None] | None = None
        self._playing = True
        self._under_way = self._due = False
        self._steps = 0
        self._began_at = self._seconds = 0.0
        self._struck_at: float | None = None
        self._told_at: float | None = None
        self._gave: Any = None
        self._accompanied = False

    def run(
        self,
        timeouts: Timeouts,
        limit: float,
        operate: Work[Any],
        beside: Work[Any] | None = None,
        order: Order = "before it",
        before: Work[Any] | None = None,
        after: Work[Any] | None = None,
    ) -> TrialResult:
        """Play it.

        Args:
            limit: seconds that each part of it may take.
            beside: something else, which is not cancelled unless the event loop ends.
            order: when that begins.
            before, after: what is done in the same event loop, and not cancelled; there is no
                ``after`` if that has ended.

        Raises:
            Fault: the outcome was not honest, or something is left in the event loop.
            Hang: it did not come to its end.
        """
        try:
            if before is not None:
                self._in_loop(timeouts, limit, "what comes before", before)
            self._play(timeouts, limit, self._main(operate, beside, order))
            if after is not None and not self.ended:
                self._in_loop(timeouts, limit, "what comes after", after)
            if not self._closes:
                self._check_rest(timeouts, limit)
        except Dishonest as error:
            raise Fault(f"the outcome is not honest: {error}") from error
        except asyncio.CancelledError as error:
            raise Fault("it said that it was cancelled, and it was not") from error
        finally:
            self._close()
        return TrialResult(
            self._steps,
            self._seconds,
            self._way.struck,
            self._latency,
            self._gave,
            self._accompanied,
        )

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Around the trial and what comes to rest after it: nothing is said of coroutines that
        are destroyed because their event loop is closed.

        Some of them are, once the engine lets go of what they wait for.
        """
        if not (isinstance(self._way, LoopShutdown) and self._way.closes):
            yield
            return
        with _in_silence():
            try:
                yield
            finally:
                end = time.monotonic() + _REST
                while not (gone := self._bury()) and time.monotonic() < end:
                    time.sleep(_LOOK)
            if not gone:
                raise Fault("what was under way in an event loop is kept alive after its end")

    @property
    def ended(self) -> bool:
        """Whether its event loop was ended while the operation was under way."""
        return isinstance(self._way, LoopShutdown) and self._way.struck

    def _play(self, timeouts: Timeouts, limit: float, scene: Coroutine[Any, Any, None]) -> None:
        loop = self._loop
        main = self._caller = loop.create_task(scene, name="the operation's caller")
        main.add_done_callback(self._stop)
        with self._within(timeouts, limit, "the operation"):
            loop.run_forever()
        self._playing = False
        if main.done():
            main.result()
        elif not self.ended:
            raise Fault("somebody has stopped the event loop")
        elif not self._closes:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            self._in_loop(timeouts, limit, "the end of the event loop", lambda: _all(tasks))
            if not main.cancelled():
                main.result()
                raise Fault("the end of the event loop was swallowed")

    def _in_loop(self, timeouts: Timeouts, limit: float, what: str, work: Work[Any]) -> Any:
        with self._within(timeouts, limit, what):
            return self._loop.run_until_complete(work())

    def _within(self, timeouts: Timeouts, limit: float, what: str) -> AbstractContextManager[None]:
        def stop() -> None:
            try:
                self._loop.call_soon_threadsafe(self._loop.stop)
            except RuntimeError:
                pass  # closed: it has come to its end just now

        return timeouts.within(limit, what, self._loop, stop)

    def _stop(self, _: asyncio.Task[None]) -> None:
        if self._playing:
            self._loop.stop()

    @property
    def _latency(self) -> float | None:
        if self._struck_at is None or self._told_at is None:
            return None
        return self._told_at - self._struck_at

    @property
    def _closes(self) -> bool:
        return isinstance(self._way, LoopShutdown) and self._way.closes and self._way.struck

    async def _main(self, operate: Work[Any], beside: Work[Any] | None, order: Order) -> None:
        async def operation() -> Any:
            try:
                return await operate()
            finally:
                self._over()

        other = None
        if beside is not None:
            ahead = _AHEAD if order == "after it" else 0
            other = asyncio.create_task(_call(beside, ahead), name="beside it")
            for _ in range(_AHEAD - ahead):
                await asyncio.sleep(0)
        if self._armed and not self._moment.step:
            asyncio.get_running_loop().call_later(self._moment.share * self._expected, self._ring)
        self._under_way = True
        self._began_at = time.perf_counter()
        self._gave = await self._way.run(operation)
        self._over()  # if it was cancelled before it began
        if self._gave is None and not self._way.struck:
            raise Fault("it gave no result, and had not been cancelled")
        if other is not None:
            await other
            self._accompanied = True

    def _over(self) -> None:
        if self._under_way:
            self._under_way = False
            self._told_at = time.perf_counter()
            self._seconds = self._told_at - self._began_at

    def _ring(self) -> None:
        self._due = True
        self._strike()

    def _before_step(self) -> None:
        if not self._under_way:
            return
        self._steps += 1
        if self._due or (self._armed and 0 < self._moment.step <= self._steps):
            self._strike()

    def _strike(self) -> None:
        if not self._under_way or (self._way.struck and not self._way.repeats):
            return
        self._way.strike()
        if self._way.struck and self._struck_at is None:
            self._struck_at = time.perf_counter()

    def _check_rest(self, timeouts: Timeouts, limit: float) -> None:
        left = self._in_loop(timeouts, limit, "what is left in the event loop", _rest)
        if left:
            raise Fault(f"tasks are left in the event loop: {', '.join(left)}")
        gc.collect()  # of errors that nobody has looked at, their tasks tell when they go
        if self._loop.unhandled:
            raise Fault(f"nobody handled: {'; '.join(map(_told, self._loop.unhandled))}")

    def _close(self) -> None:
        self._loop.close()
        self._caller = None
        self._way.forget()
        if self._closes or asyncio.all_tasks(self._loop):
            with _in_silence():
                self._bury()

    def _bury(self) -> bool:
        """Let what was under way in the event loop go; whether it has."""
        gc.collect()
        while self._loop.unhandled:  # they hold the tasks that they are about
            self._loop.unhandled.clear()
        return not asyncio.all_tasks(self._loop)


async def _call(work: Work[Any], after: int) -> None:
    for _ in range(after):
        await asyncio.sleep(0)
    await work()


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _rest() -> list[str]:
    """Wait until this is the only task; the names of those that stay."""
    end = time.monotonic() + _REST
    while left := asyncio.all_tasks() - {asyncio.current_task()}:
        if time.monotonic() > end:
            return sorted(f"{task.get_name()} ({task.get_coro()!r})" for task in left)
        await asyncio.sleep(_LOOK)
    return []


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    return f"{context.get('message')}" + (f" ({describe(error)})" if error else "")


@contextmanager
def _in_silence() -> Iterator[None]:
    """Drop what coroutines say that are destroyed under way."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = hook
