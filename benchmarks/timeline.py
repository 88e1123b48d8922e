"""What happens, moment by moment, when an anyio scope is cancelled around work inside MLX?

A first caller has MLX work of 100 ms done under a lock, in an anyio scope that is cancelled
40 ms after it has begun; a second one waits for the lock since 15 ms. Every moment is noted with
``time.perf_counter`` where it happens: in the event loop, at the lock, in the thread.

    published fix  an ``asyncio.Lock``, ``asyncio.shield`` around ``asyncio.to_thread``, and
                   ``await task`` in ``except CancelledError`` before the lock is released
                   (``benchmarks.holding``). anyio cancels again as long as the scope is not
                   left, so that the second cancel ends that ``await``
    run_blocking   the same function in ``engine.run_blocking``, which cannot interrupt it
    generate       ``engine.generate`` with a prompt of some thousand tokens, which is left at
                   its next prefill chunk

"Both inside" is for how long the second function had been entered while the first had not
returned. Two threads inside MLX at once may end the process. So the second function of the
published fix is kept at its first line, by a lock of its own, until the first one has returned;
nothing else is changed, and the picture shows how long that was. Each way is done several times;
the picture shows the one with the median of "both inside" (or of the lock's release).
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import anyio
import mlx.core as mx

from benchmarks.holding import PublishedFix
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting
from benchmarks.spread import Spread
from benchmarks.timeline_picture import WAYS, draw
from mlx_engine import SimpleEngine
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.work import ThreadJob

FIRST, SECOND = 0.1, 0.05  # seconds of MLX work
SECOND_ASKS, CANCEL = 0.015, 0.04  # seconds after the first one's work has begun
TRIES = 10  # on a machine so busy that the work is over before it is cancelled
PROMPT, CHUNK = 4000, 128  # tokens that are generated from, and prefilled at a time


@dataclass(frozen=True, slots=True)
class Trace:
    """One cancellation; seconds since the first caller has asked.

    Attributes:
        second_asks: when the second caller asks.
        cancel: when the scope is cancelled.
        first_told: when the first caller is out of its scope.
        second_told: when the second one has its answer.
        lock: from when to when it is held, first by the first one.
        first: when its work begins and ends.
        second: when its function is entered, begins with MLX, and returns.
    """

    second_asks: float
    cancel: float
    first_told: float
    second_told: float
    lock: list[tuple[float, float]]
    first: tuple[float, float]
    second: tuple[float, float, float]

    @property
    def both_inside(self) -> float:
        """Seconds."""
        return max(0.0, self.first[1] - self.second[0])

    @property
    def lock_free(self) -> float:
        """Seconds from the cancel until the first one's lock was released."""
        return self.lock[0][1] - self.cancel


class Work:
    """A function that keeps MLX busy, and notes when.

    Args:
        seconds: for how long.
        on_enter: called first.
        own_thread: whether it is called on a thread that does nothing else.
    """

    _one_at_a_time = threading.Lock()

    def __init__(
        self,
        seconds: float,
        on_enter: Callable[[], object] = lambda: None,
        *,
        own_thread: bool = False,
    ) -> None:
        self._seconds = seconds
        self._on_enter = on_enter
        self._own_thread = own_thread
        self.entered = self.began = self.ended = 0.0
        self.over = threading.Event()

    def __call__(self) -> None:
        self.entered = time.perf_counter()
        self._on_enter()
        with self._one_at_a_time:
            self.began = time.perf_counter()
            compute(self._seconds)
            self.ended = time.perf_counter()
            if self._own_thread:
                mx.clear_streams()  # MLX's streams must not outlive their thread
        self.over.set()


def compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    factor = mx.full((256, 256), 0.01)
    while time.perf_counter() < end:
        product = factor
        for _ in range(4):
            product = product @ factor
        mx.eval(product)


class WatchedLock(asyncio.Lock):
    """Notes from when to when it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[float, float]] = []
        self._since = 0.0

    async def acquire(self) -> Any:
        await super().acquire()
        self._since = time.perf_counter()
        return True

    def release(self) -> None:
        super().release()
        self.spans.append((self._since, time.perf_counter()))


@contextmanager
def watched_turns() -> Iterator[list[ThreadJob[Any]]]:
    """All turns on the MLX thread; the generation lock is held while one is there."""
    turns: list[ThreadJob[Any]] = []
    submit = mlx_thread.submit

    def watch(turn: ThreadJob[Any]) -> None:
        turns.append(turn)
        submit(turn)

    mlx_thread.submit = watch  # type: ignore[method-assign]
    try:
        yield turns
    finally:
        del mlx_thread.submit


async def in_thread_of_its_own(func: Callable[[], None]) -> None:
    """As ``asyncio.to_thread``, which would use a thread again whose streams are gone."""
    pool = ThreadPoolExecutor(1)
    running = asyncio.wrap_future(pool.submit(func))
    pool.shutdown(wait=False)  # when the function has returned
    await running


class TooLate(Exception):
    """The first one's work was over when it was cancelled."""


class Callers:
    """The two of them, and the moments that they see."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._scope = anyio.CancelScope()
        self.start = self.second_asks = self.cancel = self.first_told = self.second_told = 0.0

    async def run(
        self, first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]]
    ) -> None:
        waiting = asyncio.create_task(self._second(second))
        self.start = time.perf_counter()
        with self._scope:
            await first()
        self.first_told = time.perf_counter()
        await waiting
        if not self._scope.cancelled_caught:
            raise TooLate

    def begun(self, *_: object) -> None:
        """The first one's work has: in the event loop, once or more often."""
        if not self._begun.is_set():
            self._begun.set()
            self._loop.call_later(CANCEL, self._cancel)

    def begun_elsewhere(self) -> None:
        """The same, in another thread."""
        self._loop.call_soon_threadsafe(self.begun)

    def _cancel(self) -> None:
        self.cancel = time.perf_counter()
        self._scope.cancel()

    async def _second(self, call: Callable[[], Awaitable[Any]]) -> None:
        await self._begun.wait()
        await asyncio.sleep(SECOND_ASKS)
        self.second_asks = time.perf_counter()
        await call()
        self.second_told = time.perf_counter()

    def trace(
        self, lock: list[tuple[float, float]], first: tuple[float, float], second: Work
    ) -> Trace:
        def since(*moments: float) -> Any:
            return tuple(moment - self.start for moment in moments)

        return Trace(
            second_asks=self.second_asks - self.start,
            cancel=self.cancel - self.start,
            first_told=self.first_told - self.start,
            second_told=self.second_told - self.start,
            lock=[since(*span) for span in lock],
            first=since(*first),
            second=since(second.entered, second.began, second.ended),
        )


async def published_fix() -> Trace:
    lock = WatchedLock()
    call = PublishedFix(lock, in_thread_of_its_own)
    callers = Callers()
    first = Work(FIRST, callers.begun_elsewhere, own_thread=True)
    second = Work(SECOND, own_thread=True)
    await callers.run(lambda: call(first), lambda: call(second))
    await asyncio.to_thread(first.over.wait)
    return callers.trace(lock.spans, (first.entered, first.ended), second)


async def run_blocking(engine: SimpleEngine) -> Trace:
    callers = Callers()
    first, second = Work(FIRST, callers.begun_elsewhere), Work(SECOND)
    with watched_turns() as turns:
        await callers.run(lambda: engine.run_blocking(first), lambda: engine.run_blocking(second))
    return callers.trace(spans_of(turns), (first.entered, first.ended), second)


async def generate(engine: SimpleEngine) -> Trace:
    second, callers = Work(SECOND), Callers()
    prompt = [random.randrange(64, 154) for _ in range(PROMPT)]
    with watched_turns() as turns:
        await callers.run(
            lambda: engine.generate(prompt, max_tokens=1, on_progress=callers.begun),
            lambda: engine.run_blocking(second),
        )
    spans = spans_of(turns)
    return callers.trace(spans, spans[0], second)


def spans_of(turns: list[ThreadJob[Any]]) -> list[tuple[float, float]]:
    return [(turn.started, turn.ended) for turn in turns if turn.started]


async def in_time(trial: Callable[[], Awaitable[Trace]]) -> Trace:
    """The first one in which the cancel did not come too late."""
    for _ in range(TRIES):
        with suppress(TooLate):
            return await trial()
    raise SystemExit("this machine is too busy: each work was over before it was cancelled")


async def measure(model: str, setting: Setting) -> dict[str, list[Trace]]:
    async with SimpleEngine(model, prefill_step_size=CHUNK, prompt_cache_bytes=0) as engine:
        traces: dict[str, list[Trace]] = {name: [] for name in WAYS}
        for turn in range(-1, setting.repeats):  # the first one is to warm up
            for name, trial in (
                ("published fix", published_fix),
                ("run_blocking", partial(run_blocking, engine)),
                ("generate", partial(generate, engine)),
            ):
                trace = await in_time(trial)
                if turn >= 0:
                    traces[name].append(trace)
    return traces


def spreads_of(traces: list[Trace]) -> dict[str, Spread]:
    return {
        "both_inside_seconds": Spread.of(trace.both_inside for trace in traces),
        "lock_free_seconds": Spread.of(trace.lock_free for trace in traces),
        "work_over_seconds": Spread.of(trace.first[1] - trace.cancel for trace in traces),
        "second_enters_seconds": Spread.of(trace.second[0] - trace.cancel for trace in traces),
        "told_seconds": Spread.of(trace.first_told - trace.cancel for trace in traces),
    }


def typical(traces: list[Trace]) -> Trace:
    """The middle one."""
    return sorted(traces, key=lambda trace: (trace.both_inside, trace.lock_free))[len(traces) // 2]


def main() -> None:
    setting = parse_setting("timeline", __doc__, repeats=9)
    about = f"{setting.repeats} rounds. {INTERVAL}"
    report = Report(setting, about, picture="cancel_timeline.png")
    with model_folder(setting) as model:
        traces = asyncio.run(measure(model, setting))
    spreads = {name: spreads_of(of_way) for name, of_way in traces.items()}
    head = ["ms from the cancel", "both inside (how long)", "the lock is free"]
    head += ["the first one's work is over", "the second one enters", "the first caller knows"]
    rows = [
        [name, *(spread.text(1, 1e3) for spread in of_way.values())]
        for name, of_way in spreads.items()
    ]
    report.add(markdown_table(head, rows))
    ways = {
        name: {
            **{what: spread.record() for what, spread in spreads[name].items()},
            "shown": asdict(typical(of_way)),
        }
        for name, of_way in traces.items()
    }
    report.finish({"rounds": setting.repeats, "ways": ways}, draw)


if __name__ == "__main__":
    main()
