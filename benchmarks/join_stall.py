"""How long do running streams stand still while a prompt of 6,000 tokens joins the batch?

Some streams of short prompts run in a batch, and their readers note when each chunk is there.
Then a request with the long prompt is submitted. Its join lasts from there until it has its
first token. Measured for each of the running streams: every gap between two chunks that
overlaps the join; the longest one of all streams counts.

    engine, limit off / 200 / 50    ``BatchedEngine(max_decode_pause_ms=...)``, prefill by 512
    mlx_lm by 2048                  ``BatchGenerator`` as it comes: the time between two calls
                                    of ``next()`` that gave tokens, on the MLX thread
    mlx_lm by 512                   the same with ``prefill_step_size=512``

In each round, beside each way: the *step*, which is the median gap of the same streams before
the join; the time to first token of the long prompt; and what the running streams got while it
joined, in tokens a second, as a share of before. One of the engine's streams has a logits
processor that changes nothing and notes when it is called: gaps by a clock on the MLX thread,
which the event loop's lateness is not part of.

A *slice* is the time of one prefill chunk of 512 tokens, done by a plain forward pass of the
model with a KV cache of its own, while nothing else runs. Chunks take longer the more is in the
cache: the last whole one, with 5,120 tokens before it, is the slice that gaps are compared with,
for the longest gap is expected there; the median over all chunks is given, too. They are measured
anew right before each join. Once a round: the time to first token of the same prompt when
nothing else runs.

"Of the bound" is the longest gap of a join over (3 steps + 1 slice), as measured right before it.

Cancelled: a ``generate`` of the long prompt is cancelled (``task.cancel()``) at a random moment
of its join, while the streams run; until ``CancelledError`` has been raised to its caller.
"""

from __future__ import annotations

import asyncio
import random
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.drawing import GREY, draw_dots, log_scale, new_figure
from benchmarks.joining import (
    SLICE,
    Join,
    Plan,
    Running,
    engine_join,
    measure_chunks,
    raw_join,
)
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting, rotated
from benchmarks.spread import Record, Spread
from mlx_engine import BatchedEngine

LIMITS = {"engine, limit off": None, "engine, limit 200": 200.0, "engine, limit 50": 50.0}
RAW_STEPS = {"mlx_lm by 2048": 2048, f"mlx_lm by {SLICE}": SLICE}


@dataclass(slots=True)
class Measured:
    """Everything; by way one entry a round, or a trial in ``freed``."""

    joins: dict[str, list[Join]] = field(default_factory=dict)
    freed: dict[str, list[float]] = field(default_factory=dict)
    chunks: list[list[float]] = field(default_factory=list)  # seconds each, plain forward passes
    alone: list[float] = field(default_factory=list)  # first token when nothing else runs

    @property
    def slices(self) -> list[float]:
        """The last whole chunk of each time."""
        return [chunks[-1] for chunks in self.chunks]


async def first_token_alone(engine: BatchedEngine, plan: Plan) -> float:
    result = await engine.generate(plan.long(), max_tokens=1, ignore_eos=True)
    return result.timings.time_to_first_token


async def freed_after(engine: BatchedEngine, plan: Plan, length: float) -> float | None:
    """Seconds from ``cancel`` until the caller has it; ``None`` if it came too late."""
    async with Running(engine, plan) as running:
        await running.steps(5)
        task = asyncio.create_task(engine.generate(plan.long(), max_tokens=1, ignore_eos=True))
        await asyncio.sleep(random.uniform(0.05, 0.9) * length)
        start = time.perf_counter()
        task.cancel()
        await asyncio.wait({task})
        seconds = time.perf_counter() - start
        await running.steps(5)  # the others go on
    return seconds if task.cancelled() else None


@asynccontextmanager
async def engines(model: str, plan: Plan) -> AsyncIterator[dict[str, BatchedEngine]]:
    """One for each limit, with its model; all on the one MLX thread."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                BatchedEngine(
                    model,
                    max_batch_size=plan.streams + 1,
                    prefill_step_size=SLICE,
                    max_decode_pause_ms=limit,
                    prompt_cache_bytes=0,
                )
            )
            for name, limit in LIMITS.items()
        }


async def measure_all(model: str, setting: Setting, plan: Plan) -> Measured:
    measured = Measured({name: [] for name in (*LIMITS, *RAW_STEPS)}, {name: [] for name in LIMITS})
    async with engines(model, plan) as by_name:
        any_engine = next(iter(by_name.values()))
        await any_engine.run_blocking(measure_chunks, any_engine, plan)  # warm-up
        for engine in by_name.values():
            await engine_join(engine, Plan(plan.streams, 2 * SLICE, 0))
        for turn in range(setting.repeats):
            measured.alone.append(await first_token_alone(any_engine, plan))
            for name in rotated(list(measured.joins), turn):
                chunks = await any_engine.run_blocking(measure_chunks, any_engine, plan)
                measured.chunks.append(chunks)
                if (engine := by_name.get(name)) is not None:
                    join = await engine_join(engine, plan)
                else:
                    join = await any_engine.run_blocking(
                        raw_join, any_engine, plan, RAW_STEPS[name]
                    )
                measured.joins[name].append(replace(join, slice=chunks[-1]))
                for _ in range(plan.cancels if engine is not None else 0):
                    seconds = await freed_after(engine, plan, join.first_token)
                    if seconds is not None:
                        measured.freed[name].append(seconds)
    return measured


def ms(values: list[float]) -> str:
    return Spread.of(values).text(1, 1e3) if values else "-"


def tables(measured: Measured) -> list[str]:
    gaps, cancels = [], []
    for name, joins in measured.joins.items():
        gaps.append(
            [
                name,
                ms([join.gap for join in joins]),
                Spread.of(join.of_bound for join in joins).text(2),
                ms([join.thread_gap for join in joins]),
                Spread.of(join.where for join in joins).text(2),
                ms([join.step for join in joins]),
                ms([join.first_token for join in joins]),
                Spread.of(join.share for join in joins).text(2),
            ]
        )
    for name, freed in measured.freed.items():
        cancels.append([name, ms(freed), ms(measured.slices), str(len(freed))])
    head = ["a long prompt joins", "longest gap ms", "of the bound", "on the MLX thread ms"]
    head += ["gap over at, of the join", "step ms", "first token ms", "streams' rate, of before"]
    every = [seconds for chunks in measured.chunks for seconds in chunks]
    reference = [
        ["last whole chunk", ms(measured.slices)],
        ["all chunks", ms(every)],
        ["first token", ms(measured.alone)],
    ]
    return [
        markdown_table(head, gaps),
        markdown_table(["the long prompt alone", "ms"], reference),
        markdown_table(["cancelled while it joins", "out ms", "slice ms", "trials"], cancels),
    ]


def record_of(measured: Measured) -> Record:
    return {
        "joins": {
            name: {
                "longest_gap_seconds": Spread.of(join.gap for join in joins).record(),
                "of_bound": Spread.of(join.of_bound for join in joins).record(),
                "gap_over_at": Spread.of(join.where for join in joins).record(),
                "mlx_thread_gap_seconds": Spread.of(join.thread_gap for join in joins).record(),
                "slice_seconds": Spread.of(join.slice for join in joins).record(),
                "step_seconds": Spread.of(join.step for join in joins).record(),
                "first_token_seconds": Spread.of(join.first_token for join in joins).record(),
                "streams_rate_of_before": Spread.of(join.share for join in joins).record(),
            }
            for name, joins in measured.joins.items()
        },
        "chunk_seconds_before_each_join": measured.chunks,
        "slice_seconds": Spread.of(measured.slices).record(),
        "first_token_alone_seconds": Spread.of(measured.alone).record(),
        "cancelled_seconds": {
            name: Spread.of(freed).record() for name, freed in measured.freed.items() if freed
        },
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 2.7)
    if made is None:
        return None
    figure, (left, right) = made
    joins = record["joins"]
    gaps = {name: Spread.read(join["longest_gap_seconds"]) for name, join in joins.items()}
    draw_dots(left, gaps, "longest gap, ms; grey: 3 steps + 1 slice", 1e3)
    for place, join in enumerate(joins.values()):
        bound = (3 * join["step_seconds"]["median"] + join["slice_seconds"]["median"]) * 1e3
        left.plot([bound, bound], [place - 0.4, place + 0.4], color=GREY, linewidth=4, zorder=0)
    log_scale(left, "x")
    left.set_title("The streams that run")
    first = {name: Spread.read(join["first_token_seconds"]) for name, join in joins.items()}
    draw_dots(right, first, "first token, s; grey: nothing else runs")
    alone = record["first_token_alone_seconds"]["median"]
    right.axvline(alone, color=GREY, linewidth=4, zorder=0)
    right.set_yticks(range(len(first)), [""] * len(first))
    right.set_xlim(left=0)
    right.set_title("The long prompt that joins")
    return figure


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="that run (default 4)")
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens that join (default 6000)")


async def measure(setting: Setting, model: str) -> None:
    random.seed(0)
    plan = Plan(
        setting.own.streams,
        setting.own.prompt or (2000 if setting.quick else 6000),
        1 if setting.quick else 2,
    )
    about = f"{plan.streams} running streams, {plan.long_prompt} tokens join"
    report = Report(setting, f"{about}, {setting.repeats} rounds. {INTERVAL}")
    measured = await measure_all(model, setting, plan)
    for table in tables(measured):
        report.add(table)
    found = {
        "rounds": setting.repeats,
        "streams": plan.streams,
        "long_prompt": plan.long_prompt,
        "prefill_step_size": SLICE,
        **record_of(measured),
    }
    report.finish(found, draw)


def main() -> None:
    setting = parse_setting("join_stall", __doc__, repeats=7, quick_repeats=2, add_own=add_options)
    with model_folder(setting) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
