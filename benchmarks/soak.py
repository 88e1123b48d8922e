"""Minutes of everything at once: are all tokens right, does anything hang, does anything grow?

48 users share a ``BatchedEngine`` with room for 16 rows, a queue, and a prompt cache so small
that it evicts. Each asks for one thing after another, at random: whole answers and streams,
greedy, seeded and free, prompts that share their beginnings and prompts that are new, batches,
slow readers; tasks that are cancelled, once and twice, time limits, streams that are closed or
cancelled early; logits processors that raise; functions of their own on the MLX thread. The right
answers were made at the beginning, when nothing else ran (``benchmarks.soak_load``), and each
token of every request that has one is compared with it, also of those that were ended early and
whose tokens were read.

Every few seconds a sample: MLX's active and cached memory, the process's resident memory, asyncio
tasks, threads, and the engine's own statistics. The first third of the samples is warm-up. What
is reported is the median of each third; "flat" is when the last third's is at most 10 % (and
some) above the second's.

At the end, when all users have gone: nothing may run or wait in the engine, and no task or thread
may be left that was not there before.

The exit code is 1 when a token was wrong, a request hung (60 s) or ended as it should not have,
something was left at the end, the event loop reported an error, or memory, tasks or threads grew.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import threading
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, NoReturn

from benchmarks.drawing import MARKERS, SERIES, new_figure
from benchmarks.report import Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting
from benchmarks.soak_load import Load, Tally, make_known
from benchmarks.soak_samples import MEASURES, Sampler, Samples
from benchmarks.spread import Record, Spread
from mlx_engine import BatchedEngine

USERS = 48
ROWS = 16
CACHE_BYTES = 16 * 2**20  # of the prompt cache: reached within seconds
SAMPLES = 60  # in the whole run, but not more often than one a second
SHOWN = (
    ("memory, MiB", ("resident", "active", "cache", "prompt_cache", "kv")),
    ("of this process", ("tasks", "threads", "objects")),
    ("requests", ("rate", "running", "batch")),
)


@dataclass(slots=True)
class Soak:
    """What came out."""

    seconds: float
    tally: Tally
    samples: Samples
    problems: list[str]


async def soak(model: str, setting: Setting, seconds: float) -> Soak:
    tally = Tally()
    problems: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: problems.append(f"the event loop reports: {context}")
    )
    memory = setting.own.kv_memory
    async with BatchedEngine(
        model,
        max_batch_size=ROWS,
        prompt_cache_bytes=CACHE_BYTES,
        kv_cache_memory_bytes=None if memory is None else int(memory * 2**20),
    ) as engine:
        known = await make_known(engine)
        await asyncio.to_thread(gc.collect)
        idle = Idle.now()
        sampler = Sampler(engine, tally)
        start = time.monotonic()
        interval = max(1.0, seconds / SAMPLES)
        sampling = asyncio.create_task(sampler.run_until(start + seconds, interval))
        users = [
            Load(engine, known, setting.own.seed * USERS + number, tally) for number in range(USERS)
        ]
        await asyncio.gather(*(user.run_until(start + seconds) for user in users))
        seconds = time.monotonic() - start
        if any("hangs" in line for line in tally.wrong):
            give_up(tally)
        sampling.cancel()  # only of use when something was wrong
        await asyncio.wait({sampling})
        if not sampling.cancelled() and sampling.exception() is not None:
            problems.append(f"sampling failed: {sampling.exception()!r}")
        problems += await left_over(engine, idle)
    problems += tally.wrong
    problems += [
        f"{MEASURES[name].unit} grew: {samples_text(sampler.samples, name)}"
        for name in MEASURES
        if sampler.samples.times and sampler.samples.grown(name)
    ]
    return Soak(seconds, tally, sampler.samples, problems)


def give_up(tally: Tally) -> NoReturn:
    """Something hangs, and leaving the engine may hang, too."""
    faulthandler.dump_traceback(all_threads=True)
    for line in tally.wrong:
        print(f"PROBLEM: {line}")
    sys.stdout.flush()
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Idle:
    """What is there when nothing runs."""

    tasks: int
    threads: int

    @classmethod
    def now(cls) -> Idle:
        return cls(len(asyncio.all_tasks()), threading.active_count())


async def left_over(engine: BatchedEngine, before: Idle) -> list[str]:
    """What should not be there any more; things may take a second to go."""
    problems: list[str] = []
    for _ in range(20):
        await asyncio.sleep(0.1)
        stats, now = engine.stats(), Idle.now()
        problems = []
        if stats.running or stats.waiting:
            problems.append(
                f"{stats.running} run and {stats.waiting} wait when all users have gone"
            )
        if now.tasks > before.tasks:
            names = sorted(str(task.get_coro()) for task in asyncio.all_tasks())
            problems.append(f"{now.tasks} tasks are left, {before.tasks} were there: {names}")
        if now.threads > before.threads:
            names = sorted(thread.name for thread in threading.enumerate())
            # asyncio's own pool, which the samples use, keeps its threads.
            names = [name for name in names if not name.startswith("asyncio")]
            if len(names) > before.threads:
                problems.append(f"threads are left, {before.threads} were there: {names}")
        if not problems:
            break
    return problems


def samples_text(samples: Samples, name: str) -> str:
    scale = MEASURES[name].scale
    return " -> ".join(f"{value * scale:.1f}" for value in samples.thirds(name))


def tables(done: Soak) -> list[str]:
    tally, samples = done.tally, done.samples
    endings = [[ending.value, str(count)] for ending, count in tally.endings.most_common()]
    endings += [
        ["all", str(tally.requests)],
        ["tokens of finished ones", str(tally.tokens)],
        ["tokens compared", str(tally.compared)],
        ["prompt tokens from the cache", str(tally.cached)],
        ["wrong", str(len(tally.wrong))],
    ]
    parts = [markdown_table(["what became of the requests", "number"], endings)]
    if samples.times:
        rows = []
        for name, measure in MEASURES.items():
            thirds = [f"{value * measure.scale:.1f}" for value in samples.thirds(name)]
            flat = "" if measure.slack is None else "no" if samples.grown(name) else "yes"
            rows.append([measure.unit, *thirds, flat])
        head = ["medians of", "first third", "second third", "last third", "flat"]
        parts.append(markdown_table(head, rows))
    if tally.cancels:
        spread = Spread.of(tally.cancels)
        row = [f"{spread.percentile(percent) * 1e3:.1f}" for percent in (50, 99, 100)]
        head = ["task.cancel() to CancelledError", "p50 ms", "p99 ms", "max ms"]
        parts.append(markdown_table(head, [[f"{len(tally.cancels)} times", *row]]))
    return parts


def record_of(done: Soak) -> Record:
    tally, samples = done.tally, done.samples
    return {
        "seconds": done.seconds,
        "endings": {ending.value: count for ending, count in tally.endings.items()},
        "requests": tally.requests,
        "tokens": tally.tokens,
        "tokens_compared": tally.compared,
        "prompt_tokens_from_cache": tally.cached,
        "cancel_seconds": {
            name: Spread.of(tally.cancels).percentile(percent)
            for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
            if tally.cancels
        },
        "problems": done.problems,
        "medians_of_thirds": {
            name: list(samples.thirds(name)) for name in MEASURES if samples.times
        },
        "sample_seconds": samples.times,
        "samples": samples.values,
        "last_stats": samples.stats[-1:],
    }


def draw(record: Record) -> Any:
    made = new_figure(1, len(SHOWN), 3.6)
    if made is None:
        return None
    figure, axes = made
    for axis, (title, names) in zip(axes, SHOWN, strict=True):
        for series, name in enumerate(names):
            measure = MEASURES[name]
            values = [value * measure.scale for value in record["samples"][name]]
            style = MARKERS[series] + "-"
            label = measure.unit.removesuffix(", MiB")
            colour = SERIES[series]
            axis.plot(
                record["sample_seconds"],
                values,
                style,
                color=colour,
                label=label,
                markevery=max(1, len(values) // 8),
            )
        axis.set_title(title)
        axis.set_xlabel("seconds")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, metavar="M", help="default 3, quick 0.3")
    parser.add_argument(
        "--kv-memory", type=float, metavar="MIB", help="kv_cache_memory_bytes (default: no limit)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is asked")


def main() -> None:
    setting = parse_setting("soak", __doc__, repeats=None, add_own=add_options)
    seconds = 60 * (setting.own.minutes or (0.3 if setting.quick else 3))
    report = Report(setting, f"{USERS} users, {ROWS} rows, {seconds:.0f} s.")
    with model_folder(setting) as model:
        done = asyncio.run(soak(model, setting, seconds))
    for table in tables(done):
        report.add(table)
    asked = {"seed": setting.own.seed, "kv_memory_mib": setting.own.kv_memory}
    report.finish({**asked, **record_of(done)}, draw)
    for problem in done.problems:
        print(f"PROBLEM: {problem}")
    sys.exit(1 if done.problems else 0)


if __name__ == "__main__":
    main()
