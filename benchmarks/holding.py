"""Waiting for a worker that cannot be interrupted: what it costs, and whether the lock is held.

**Drain.** A caller in a cancelled anyio scope waits one second for such a worker. anyio cancels
again and again until the scope is left; the processor time of the whole process in that second
is given as a share of one core.

**Overlap.** A function of fixed length is cancelled halfway while a second one waits for the
lock. For how long do both run? One cancel, two cancels, and an anyio scope that times out.

Two contrasts, with an ``asyncio.Lock`` and ``time.sleep`` in place of MLX, since an overlap
inside MLX may end the process: the published fix for such locks (shield the worker, and in
``except CancelledError`` await it before the lock is released), and a drain that catches each
``CancelledError`` and goes on waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from benchmarks.report import markdown_table
from benchmarks.setting import Setting
from benchmarks.spread import Record, Spread
from mlx_engine import SimpleEngine

HOLD = 0.1  # seconds that a function of the overlap measurement takes
DRAIN = 1.0  # seconds over which processor time is taken


class Call(Protocol):
    """Runs a blocking function under a lock, in turn."""

    def __call__(self, func: Callable[[], None], /) -> Awaitable[None]: ...


class PublishedFix:
    """A lock around a thread; the worker is shielded, and awaited when a cancel comes.

    Args:
        lock: one that is watched, say.
        in_thread: runs a function in another thread.
    """

    def __init__(
        self,
        lock: asyncio.Lock | None = None,
        in_thread: Callable[[Callable[[], None]], Coroutine[Any, Any, None]] = asyncio.to_thread,
    ) -> None:
        self._lock = lock or asyncio.Lock()
        self._in_thread = in_thread

    async def __call__(self, func: Callable[[], None], /) -> None:
        async with self._lock:
            task = asyncio.create_task(self._in_thread(func))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                await task
                raise


class RetryingDrain:
    """The same, going on with the wait at each further cancel."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __call__(self, func: Callable[[], None], /) -> None:
        async with self._lock:
            task = asyncio.create_task(asyncio.to_thread(func))
            cancelled: asyncio.CancelledError | None = None
            while not task.done():
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError as error:
                    cancelled = cancelled or error
            if cancelled is not None:
                raise cancelled


async def drain_share(call: Call) -> float:
    """Processor time over wall time while a cancelled anyio scope waits for its worker."""
    loop, spent = asyncio.get_running_loop(), Stopwatch()
    with anyio.CancelScope() as scope:

        def begun() -> None:
            loop.call_later(0.05, scope.cancel)
            loop.call_later(0.1, spent.start)

        def work() -> None:
            loop.call_soon_threadsafe(begun)
            time.sleep(0.1 + DRAIN)

        await call(work)
    return spent.share()


class Stopwatch:
    """Processor time of this process over wall time."""

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def share(self) -> float:
        return (time.process_time() - self._cpu) / (time.perf_counter() - self._wall)


async def overlap(
    call: Call, cancel: Callable[[Call, Callable[[], None], asyncio.Event], Awaitable[None]]
) -> float:
    """Seconds for which a second function ran while the cancelled first one still did."""
    ended = began = 0.0
    over, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def first() -> None:
        nonlocal ended
        loop.call_soon_threadsafe(begun.set)
        time.sleep(HOLD)
        ended = time.perf_counter()
        over.set()

    def second() -> None:
        nonlocal began
        began = time.perf_counter()

    async def wait_behind() -> None:
        await begun.wait()
        await call(second)

    behind = asyncio.create_task(wait_behind())
    await cancel(call, first, begun)
    await behind
    await asyncio.to_thread(over.wait)
    return max(0.0, ended - began)


async def cancel_times(
    times: int, call: Call, func: Callable[[], None], begun: asyncio.Event
) -> None:
    async def run() -> None:
        await call(func)

    task = asyncio.create_task(run())
    await begun.wait()
    await asyncio.sleep(HOLD / 2)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(HOLD / 20)
    with suppress(asyncio.CancelledError):
        await task


async def cancel_once(call: Call, func: Callable[[], None], begun: asyncio.Event) -> None:
    await cancel_times(1, call, func, begun)


async def cancel_twice(call: Call, func: Callable[[], None], begun: asyncio.Event) -> None:
    await cancel_times(2, call, func, begun)


async def cancel_scope(call: Call, func: Callable[[], None], begun: asyncio.Event) -> None:
    async def limit(scope: anyio.CancelScope) -> None:
        await begun.wait()
        scope.deadline = anyio.current_time() + HOLD / 2

    with anyio.CancelScope() as scope:
        limiting = asyncio.create_task(limit(scope))
        await call(func)
    await limiting


CANCELS = {"one cancel": cancel_once, "two cancels": cancel_twice, "anyio scope": cancel_scope}


@dataclass(frozen=True, slots=True)
class Held:
    """For each way to hold the lock: shares of a core, and seconds of overlap by kind of cancel."""

    drains: dict[str, Spread]
    overlaps: dict[str, dict[str, Spread]]

    def tables(self) -> list[str]:
        drains = [[name, spread.text(2, 100)] for name, spread in self.drains.items()]
        overlaps = [
            [name, *(spread.text(1, 1e3) for spread in by_cancel.values())]
            for name, by_cancel in self.overlaps.items()
        ]
        return [
            markdown_table(["two functions at once, ms", *CANCELS], overlaps),
            markdown_table(["waiting in a cancelled anyio scope", "% of a core"], drains),
        ]

    def record(self) -> Record:
        return {
            "drain_share_of_a_core": {name: s.record() for name, s in self.drains.items()},
            "overlap_seconds": {
                name: {how: spread.record() for how, spread in by_cancel.items()}
                for name, by_cancel in self.overlaps.items()
            },
        }


async def measure_holding(model: str, setting: Setting) -> Held:
    """Both measurements, for the engine and for the contrasts."""
    async with SimpleEngine(model) as engine:
        calls: dict[str, Call] = {
            "mlx_engine": engine.run_blocking,
            "published fix": PublishedFix(),
            "retrying drain": RetryingDrain(),
        }
        rounds = 1 if setting.quick else 3
        # Under the scope the published fix does not wait at all, so it has no drain to measure.
        drains = {
            name: Spread.of([await drain_share(calls[name]) for _ in range(rounds)])
            for name in ("mlx_engine", "retrying drain")
        }
        overlaps = {
            name: {
                how: Spread.of([await overlap(call, cancel) for _ in range(setting.repeats)])
                for how, cancel in CANCELS.items()
            }
            for name, call in calls.items()
        }
    return Held(drains, overlaps)
