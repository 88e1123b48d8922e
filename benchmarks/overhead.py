"""What does this library cost over raw mlx_lm, and does generating hold the event loop up?

One model, one prompt, greedy, the same number of tokens, and the token ids compared: a run in
which they differ fails. Every way goes over the same MLX thread and the same loaded weights.

    raw       ``mlx_lm.stream_generate`` in a plain loop, as one function on the MLX thread
    raw again the same once more: how far its ratio is from 1 is the noise of this machine
    raw, loop awake
              the same while a coroutine in the event loop sleeps 1 ms at a time and does
              nothing: what any activity of the loop costs MLX, whoever causes it
    stream    ``async for chunk in engine.stream_generate(...)``
    generate  ``await engine.generate(...)``

A round runs each way once, and the order rotates from round to round. Ratios and differences
are taken within a round. The difference grows far less than what a token takes, so the ratio
comes closer to 1 the bigger the model is. Times are end to end, from the call to its completion
in the event loop: tokenizing, prefill and the way to the MLX thread and back count. "Decode
only" is from the first token to the last, by a clock on the MLX thread.

Lateness is how long a callback waits that another thread hands to the event loop, once a
millisecond, in runs of their own, since the probe itself takes time. (A sleeping coroutine
would measure the timers instead: Linux's epoll rounds a wait up to a whole millisecond.) "Raw"
is generation with nothing for the event loop to do: what competing for the GIL and the
processor costs.
"""

from __future__ import annotations

import asyncio
import copy
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import mlx_lm

from benchmarks.drawing import (
    BLACK,
    MARKERS,
    SERIES,
    draw_dots,
    legend_below,
    log_scale,
    new_figure,
)
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting, rotated
from benchmarks.spread import Record, Spread
from mlx_engine import BaseEngine, SimpleEngine

PROMPT = "The quick brown fox jumps over the lazy dog, and then it"
TICK = 0.001  # seconds between two probes of the event loop


@dataclass(frozen=True, slots=True)
class Answer:
    """What one way gave: token ids, and seconds from the first of them to the last."""

    tokens: list[int]
    decode: float


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run: tokens a second end to end and decode only, CPU seconds a token."""

    rate: float
    decode_rate: float
    cpu: float


Way = Callable[[BaseEngine, int], Awaitable[Answer]]


async def raw(engine: BaseEngine, count: int) -> Answer:
    return await engine.run_blocking(_raw, engine, count)


def _raw(engine: BaseEngine, count: int) -> Answer:
    """On the MLX thread, and with the very model that the engine uses."""
    loaded = engine._holder.model()
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.eos_token_ids = []  # what ignore_eos is to the engine
    tokens: list[int] = []
    text = ""
    first = 0.0
    for response in mlx_lm.stream_generate(loaded.model, tokenizer, PROMPT, max_tokens=count):
        if not tokens:
            first = time.perf_counter()
        text += response.text
        tokens.append(response.token)
    return Answer(tokens, time.perf_counter() - first)


async def stream(engine: BaseEngine, count: int) -> Answer:
    tokens: list[int] = []
    text = ""
    async with engine.stream_generate(PROMPT, max_tokens=count, ignore_eos=True) as chunks:
        async for chunk in chunks:
            text += chunk.text
            tokens.extend(chunk.tokens)
    return Answer(tokens, chunks.result.timings.decode)


async def generate(engine: BaseEngine, count: int) -> Answer:
    result = await engine.generate(PROMPT, max_tokens=count, ignore_eos=True)
    return Answer(list(result.tokens), result.timings.decode)


async def idle(engine: BaseEngine, count: int) -> Answer:
    """The control of the lateness probe: as long as a generation, roughly, and no work."""
    await asyncio.sleep(count * TICK)
    return Answer([], 0.0)


async def raw_loop_awake(engine: BaseEngine, count: int) -> Answer:
    ticking = asyncio.create_task(tick())
    try:
        return await raw(engine, count)
    finally:
        ticking.cancel()


WAYS: dict[str, Way] = {
    "raw": raw,
    "raw again": raw,
    "raw, loop awake": raw_loop_awake,
    "stream": stream,
    "generate": generate,
}
PROBED: dict[str, Way] = {"idle": idle, "raw": raw, "stream": stream, "generate": generate}


async def timed(way: Way, engine: BaseEngine, count: int, expected: list[int]) -> Run:
    cpu, start = time.process_time(), time.perf_counter()
    answer = await way(engine, count)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if answer.tokens != expected:
        raise SystemExit(f"{way.__name__} gave other tokens than raw mlx_lm: nothing to compare")
    return Run(count / seconds, (count - 1) / answer.decode, cpu / count)


async def measure_rates(engine: BaseEngine, setting: Setting, count: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    expected = (await raw(engine, count)).tokens
    for way in WAYS.values():  # warm-up
        await timed(way, engine, count, expected)
    for turn in range(setting.repeats):
        for name in rotated(list(WAYS), turn):
            runs[name].append(await timed(WAYS[name], engine, count, expected))
    return runs


async def tick() -> None:
    while True:
        await asyncio.sleep(TICK)


class Probe:
    """A thread that hands the running event loop a callback each tick, while entered.

    Attributes:
        late: seconds that each waited.
    """

    def __init__(self) -> None:
        self.late: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hand_over)

    def _hand_over(self) -> None:
        while not self._stop.wait(TICK):
            self._loop.call_soon_threadsafe(self._land, time.perf_counter())

    def _land(self, handed_over: float) -> None:
        self.late.append(time.perf_counter() - handed_over)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


async def measure_lateness(
    engine: BaseEngine, setting: Setting, count: int
) -> dict[str, list[list[float]]]:
    """For each probed way, seconds of lateness: a list a round."""
    late: dict[str, list[list[float]]] = {name: [] for name in PROBED}
    for turn in range(setting.repeats):
        for name in rotated(list(PROBED), turn):
            with Probe() as probe:
                await PROBED[name](engine, count)
            late[name].append(probe.late)
    return late


def ratios(runs: dict[str, list[Run]], name: str) -> Spread:
    """Of end-to-end rates, within each round."""
    return Spread.of(a.rate / b.rate for a, b in zip(runs[name], runs["raw"], strict=True))


def added(runs: dict[str, list[Run]], name: str) -> Spread:
    """Seconds a token more than raw, within each round."""
    pairs = zip(runs[name], runs["raw"], strict=True)
    return Spread.of(1 / a.rate - 1 / b.rate for a, b in pairs)


def rate_table(runs: dict[str, list[Run]]) -> str:
    rows = []
    for name, of_way in runs.items():
        rows.append(
            [
                name,
                Spread.of(run.rate for run in of_way).text(0),
                ratios(runs, name).text(3),
                added(runs, name).text(0, 1e6),
                Spread.of(run.decode_rate for run in of_way).text(0),
                Spread.of(run.cpu for run in of_way).text(0, 1e6),
            ]
        )
    head = [
        "way",
        "tokens/s",
        "of raw",
        "added us a token",
        "decode only, tokens/s",
        "CPU us a token",
    ]
    return markdown_table(head, rows)


def lateness_table(late: dict[str, list[list[float]]]) -> str:
    rows = []
    for name, rounds in late.items():
        row = [name]
        for percent in (50, 99, 100):
            spread = Spread.of(Spread.of(samples).percentile(percent) for samples in rounds)
            row.append(spread.text(2, 1e3))
        rows.append([*row, str(sum(map(len, rounds)))])
    return markdown_table(["while", "p50 ms", "p99 ms", "max ms", "samples"], rows)


def lateness_record(rounds: list[list[float]]) -> Record:
    every = Spread.of(value for samples in rounds for value in samples)
    return {
        "p50": every.percentile(50),
        "p99": every.percentile(99),
        "max": max(every.values),
        "samples": len(every.values),
        "p99_by_round": [Spread.of(samples).percentile(99) for samples in rounds],
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 2.9)
    if made is None:
        return None
    figure, (left, right) = made
    ways = {
        name: Spread.read(way["ratio_to_raw"])
        for name, way in record["ways"].items()
        if name != "raw"
    }
    draw_dots(left, ways, "tokens/s, end to end, of raw mlx-lm's")
    left.axvline(1.0, color=BLACK, linewidth=1)
    left.set_title("A request")
    late = record["loop_lateness_seconds"]
    for place, percentile in enumerate(("p50", "p99", "max")):
        values = [one[percentile] * 1e3 for one in late.values()]
        style = MARKERS[place]
        right.plot(values, range(len(late)), style, color=SERIES[place], label=percentile)
    right.set_yticks(range(len(late)), list(late))
    right.set_ylim(len(late) - 0.5, -0.5)
    log_scale(right, "x")
    right.set_xlabel("ms that a callback waits in the event loop")
    right.grid(visible=False, axis="y")
    right.set_title("The event loop meanwhile")
    legend_below(figure, right)
    return figure


async def measure(setting: Setting, model: str) -> None:
    count = 100 if setting.quick else 400
    async with SimpleEngine(model, prompt_cache_bytes=0) as engine:
        runs = await measure_rates(engine, setting, count)
        late = await measure_lateness(engine, setting, count)
    per_token = statistics.median(1e3 / run.decode_rate for run in runs["raw"])
    about = f"{count} tokens a run, {setting.repeats} rounds; raw mlx-lm takes {per_token:.2f} ms"
    report = Report(setting, f"{about} a token. {INTERVAL}")
    report.add(rate_table(runs))
    report.add(lateness_table(late))
    found = {
        "tokens": count,
        "rounds": setting.repeats,
        "raw_ms_per_token": per_token,
        "ways": {
            name: {
                "tokens_per_second": Spread.of(run.rate for run in of_way).record(),
                "ratio_to_raw": ratios(runs, name).record(),
                "added_seconds_per_token": added(runs, name).record(),
                "decode_tokens_per_second": Spread.of(run.decode_rate for run in of_way).record(),
                "cpu_seconds_per_token": Spread.of(run.cpu for run in of_way).record(),
            }
            for name, of_way in runs.items()
        },
        "loop_lateness_seconds": {name: lateness_record(rounds) for name, rounds in late.items()},
    }
    report.finish(found, draw)


def main() -> None:
    setting = parse_setting("overhead", __doc__, repeats=15, layers=3)
    with model_folder(setting) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
