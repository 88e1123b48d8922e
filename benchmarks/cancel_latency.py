"""How soon is a cancelled request out of the way, and is the lock held until then?

A request is cancelled at a random moment of its decode, or of the prefill of 6,000
tokens: a stream by ``stream.cancel()``, a ``generate`` by ``task.cancel()``. At that moment
another request is queued behind it. Measured from the cancel: until the awaiting side has the
cancellation and the generation lock is free, and until the other request's first token. In the
same run, without a cancel: what one decode step and one prefill chunk take (by the times at
which the event loop hears of them), and the other request's time to first token when idle.

The bound to expect is one chunk, or one decode step and what it takes to get out: mlx_lm hands
a step to MLX before it gives out the token of the one before, so the step under way when the
cancel comes is waited for, and no further one is begun.

The other two tables are explained in ``benchmarks.holding``: what it costs to wait for a worker
that cannot be interrupted, and whether the lock is really held until it has returned.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from benchmarks.drawing import GREY, draw_dots, log_scale, new_figure
from benchmarks.holding import measure_holding
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting
from benchmarks.spread import Record, Spread
from mlx_engine import BaseEngine, Progress, SimpleEngine
from mlx_engine.core.mlx_thread import mlx_thread

LONG_PROMPT, QUICK_PROMPT = 6000, 2500
DECODE_TOKENS = 400
CHUNKS = (128, 512, 2048)  # 512 is the engine's default


@dataclass(slots=True)
class Latency:
    """Seconds from ``cancel()``, one value a trial, and what they are to be compared with.

    Attributes:
        free: until the await returned, with the lock free.
        next_token: until the first token of the request behind.
        piece: what one decode step or prefill chunk takes, uncancelled.
        idle_first_token: of the same next request when nothing is in its way.
    """

    free: list[float] = field(default_factory=list)
    next_token: list[float] = field(default_factory=list)
    piece: list[float] = field(default_factory=list)
    idle_first_token: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Work:
    """A request to be cancelled in one of its phases.

    Attributes:
        tokens: the prompt.
        in_decode: cancel it in its decode, else in its prefill.
        length: seconds that the phase takes, uncancelled.
    """

    tokens: list[int]
    in_decode: bool
    length: float

    async def cancelled(self, engine: BaseEngine, begin: Callable[..., Trial]) -> Trial:
        """Start it, wait for a random moment of its phase, and cancel it."""
        decoding = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            if progress.done == progress.total:
                decoding.set()

        trial = begin(engine, self.tokens, on_progress)
        if self.in_decode:
            await decoding.wait()
        await asyncio.sleep(random.uniform(0.05, 0.9) * self.length)
        return trial


class Trial(Protocol):
    """A request that is under way."""

    def cancel(self) -> None: ...

    async def out(self) -> None:
        """Wait until it is out of MLX; it must have been cancelled."""


class StreamTrial:
    """A stream with a task that reads it."""

    def __init__(
        self, engine: BaseEngine, tokens: list[int], on_progress: Callable[[Progress], None]
    ) -> None:
        self._stream = engine.stream_generate(
            tokens, max_tokens=DECODE_TOKENS, ignore_eos=True, on_progress=on_progress
        )
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with self._stream as chunks:
            async for _ in chunks:
                pass

    def cancel(self) -> None:
        self._stream.cancel()

    async def out(self) -> None:
        await self._reader
        if self._stream.result.finish_reason != "cancelled":
            raise TooLate


class GenerateTrial:
    """A task that awaits ``generate``."""

    def __init__(
        self, engine: BaseEngine, tokens: list[int], on_progress: Callable[[Progress], None]
    ) -> None:
        self._task = asyncio.create_task(
            engine.generate(
                tokens, max_tokens=DECODE_TOKENS, ignore_eos=True, on_progress=on_progress
            )
        )

    def cancel(self) -> None:
        self._task.cancel()

    async def out(self) -> None:
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            raise TooLate


class TooLate(Exception):
    """The request had ended by itself when it was cancelled."""


WAYS: dict[str, Callable[..., Trial]] = {"stream": StreamTrial, "generate": GenerateTrial}


async def first_token(engine: BaseEngine) -> float:
    """When the first token of a short request was there, by ``time.perf_counter``."""
    async with engine.stream_generate("Next, please", max_tokens=1, ignore_eos=True) as chunks:
        async for _ in chunks:
            return time.perf_counter()
    raise RuntimeError("a request without a token")


async def measure_trial(
    engine: BaseEngine, work: Work, begin: Callable[..., Trial], latency: Latency
) -> None:
    trial = await work.cancelled(engine, begin)
    start = time.perf_counter()
    trial.cancel()
    behind = asyncio.create_task(first_token(engine))
    try:
        await trial.out()
    except TooLate:
        await behind
        return
    free = time.perf_counter()
    latency.free.append(free - start)
    latency.next_token.append(await behind - start)


async def decode_pieces(engine: BaseEngine) -> tuple[Work, list[float]]:
    """The decode to cancel, and the time between its tokens."""
    tokens = list(range(64, 96))
    async with engine.stream_generate(tokens, max_tokens=DECODE_TOKENS, ignore_eos=True) as chunks:
        times = [time.perf_counter() async for _ in chunks]
    return Work(tokens, True, times[-1] - times[0]), gaps(times)


async def prefill_pieces(length: int, engine: BaseEngine) -> tuple[Work, list[float]]:
    """The prefill to cancel, and the time that each of its whole chunks takes."""
    tokens = [64 + place % 90 for place in range(length)]
    times: list[float] = []  # at the beginning, and after each chunk

    def on_progress(progress: Progress) -> None:
        times.append(time.perf_counter())

    await engine.generate(tokens, max_tokens=1, on_progress=on_progress)
    pieces = gaps(times)[: (length - 1) // engine._config.model.prefill_step_size]
    return Work(tokens, False, sum(pieces)), pieces


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


async def measure_cancel(model: str, setting: Setting) -> dict[str, Latency]:
    async with SimpleEngine(model, prompt_cache_bytes=0) as engine:
        measured = await measure_phase(engine, setting, "decode", decode_pieces)
    pieces = partial(prefill_pieces, QUICK_PROMPT if setting.quick else LONG_PROMPT)
    for chunk in CHUNKS:
        async with SimpleEngine(model, prefill_step_size=chunk, prompt_cache_bytes=0) as engine:
            measured |= await measure_phase(engine, setting, f"prefill by {chunk}", pieces)
    return measured


async def measure_phase(
    engine: BaseEngine,
    setting: Setting,
    phase: str,
    pieces: Callable[[BaseEngine], Awaitable[tuple[Work, list[float]]]],
) -> dict[str, Latency]:
    await pieces(engine)  # warm-up
    work, before = await pieces(engine)
    latencies = {way: Latency() for way in WAYS}
    for _ in range(setting.repeats):
        for way, begin in WAYS.items():
            start = time.perf_counter()
            latencies[way].idle_first_token.append(await first_token(engine) - start)
            await measure_trial(engine, work, begin, latencies[way])
    _, after = await pieces(engine)
    for latency in latencies.values():
        latency.piece += before + after
    return {f"{phase}, {way}": latency for way, latency in latencies.items()}


def latency_table(measured: dict[str, Latency]) -> str:
    head = ["cancelled in", "lock free ms", "next first token ms", "one step or chunk ms"]
    rows = [
        [
            name,
            *(
                Spread.of(values).text(1, 1e3)
                for values in (
                    latency.free,
                    latency.next_token,
                    latency.piece,
                    latency.idle_first_token,
                )
            ),
            str(len(latency.free)),
        ]
        for name, latency in measured.items()
    ]
    return markdown_table([*head, "first token when idle ms", "trials"], rows)


def latency_record(latency: Latency) -> Record:
    return {
        "lock_free": Spread.of(latency.free).record(),
        "next_first_token": Spread.of(latency.next_token).record(),
        "one_step_or_chunk": summary(latency.piece),
        "idle_first_token": Spread.of(latency.idle_first_token).record(),
    }


def summary(values: list[float]) -> Record:
    """Without the values: there are thousands of decode steps."""
    spread = Spread.of(values)
    whole = spread.record()
    del whole["values"]
    return {**whole, "p99": spread.percentile(99), "count": len(values)}


def draw(record: Record) -> Any:
    made = new_figure(1, 1, 3.2)
    if made is None:
        return None
    figure, (axis,) = made
    latencies = record["latency_seconds"]
    free = {name: Spread.read(latency["lock_free"]) for name, latency in latencies.items()}
    draw_dots(axis, free, "ms from the cancel until the lock is free; grey: one step or chunk", 1e3)
    for place, latency in enumerate(latencies.values()):
        piece = latency["one_step_or_chunk"]["median"] * 1e3
        axis.plot([piece, piece], [place - 0.4, place + 0.4], color=GREY, linewidth=4, zorder=0)
    log_scale(axis, "x")
    return figure


async def measure(setting: Setting, model: str) -> None:
    random.seed(0)
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    measured = await measure_cancel(model, setting)
    report.add(latency_table(measured))
    held = await measure_holding(model, setting)
    for table in held.tables():
        report.add(table)
    if mlx_thread.locked:
        raise SystemExit("the generation lock is still held after all requests have ended")
    found = {
        "rounds": setting.repeats,
        "latency_seconds": {name: latency_record(latency) for name, latency in measured.items()},
        **held.record(),
    }
    report.finish(found, draw)


def main() -> None:
    setting = parse_setting("cancel_latency", __doc__, repeats=20)
    with model_folder(setting) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
