"""How long do running streams stand still while others prepare what only they need?

Some streams run in a batch, and their readers note when each chunk is there. Then comes

    a long chat     60 turns with calls of tools, and 40 tools: it is rendered by the chat template
                    and tokenized. It is cancelled when that is done, before its prefill, which
                    ``benchmarks.join_stall`` measures.
    options seen    requests of one token, one after the other, with temperatures and nuclei that
                    have been used before
    options unseen  the same with values that the process has never seen

Measured for each: the longest gap of all streams, from the first request to the end of the last
one, by the readers' clock, and the *step*, which is the median gap before.

The control is what one thread would do between two steps, as mlx_lm's own server does: the time in
which the same chat is rendered and tokenized at once, and that of one call of mlx_lm's own
sampler (``make_sampler``) on a row of log-probabilities, with options seen and unseen.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from benchmarks.drawing import draw_dots, log_scale, new_figure
from benchmarks.joining import Plan, Running
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting, rotated
from benchmarks.spread import Record, Spread
from mlx_engine import BatchedEngine

NEWCOMERS = ("a long chat", "options seen", "options unseen")
CONTROLS = ("rendered and tokenized at once", "mlx_lm, options seen", "mlx_lm, options unseen")
SEEN = {"temperature": 0.7, "top_p": 0.9}
_PAUSE = 50.0  # milliseconds of prefill between two decode steps


@dataclass(slots=True)
class Measured:
    """In seconds; an entry a round."""

    gaps: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in NEWCOMERS})
    steps: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in NEWCOMERS})
    controls: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in CONTROLS})


def long_chat() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages and tools of a coding agent in its sixtieth turn."""
    field_ = {"type": "string", "description": "the value that it is to have, in words " * 4}
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{n}",
                "description": "Does one thing, and says what it has done. " * 12,
                "parameters": {"type": "object", "properties": {f"p{i}": field_ for i in range(6)}},
            },
        }
        for n in range(40)
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Mend what is broken. " * 40}]
    for turn in range(60):
        arguments = json.dumps({"p0": f"/src/module_{turn}.py", "p1": "x" * 200})
        function = {"name": f"tool_{turn % 40}", "arguments": arguments}
        call = {"id": f"call{turn:05}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        content = f"line {turn} of the output\n" * 40
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return messages, tools


async def join_chat(engine: BatchedEngine) -> None:
    """Until its prompt is made, and its first slice is prefilled at most."""
    messages, tools = long_chat()
    begun = asyncio.Event()
    asked = engine.chat(messages, tools=tools, max_tokens=1, on_progress=lambda _: begun.set())
    task = asyncio.create_task(asked)
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})


async def join_options(engine: BatchedEngine, count: int, *, unseen: bool) -> None:
    for _ in range(count):
        options = SEEN
        if unseen:
            options = {"temperature": random.uniform(0.5, 1.5), "top_p": random.uniform(0.5, 0.99)}
        await engine.generate([1, 2, 3], max_tokens=1, ignore_eos=True, **options)  # type: ignore[arg-type]


async def beside(engine: BatchedEngine, plan: Plan, name: str, count: int) -> tuple[float, float]:
    """The longest gap while newcomers join, and the step before."""
    async with Running(engine, plan) as running:
        if name == "a long chat":
            join = join_chat(engine)
        else:
            join = join_options(engine, count, unseen=name == "options unseen")
        gap, before, _ = await running.beside(join)
    return gap, statistics.median(before)


def control(engine: BatchedEngine, name: str) -> float:
    """On the MLX thread, alone."""
    tokenizer = engine._holder.model().tokenizer
    if name == "rendered and tokenized at once":
        messages, tools = long_chat()
        for message in messages:
            for call in message.get("tool_calls", ()):
                arguments = call["function"]["arguments"]
                call["function"]["arguments"] = json.loads(arguments)
        start = time.perf_counter()
        text = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        tokenizer.encode(text, add_special_tokens=False)
        return time.perf_counter() - start
    temp, top_p = SEEN["temperature"], SEEN["top_p"]
    if name == "mlx_lm, options unseen":
        temp, top_p = random.uniform(0.5, 1.5), random.uniform(0.5, 0.99)
    logprobs = mx.random.normal((1, 512))
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    mx.eval(logprobs)
    start = time.perf_counter()
    mx.eval(make_sampler(temp=temp, top_p=top_p)(logprobs))
    return time.perf_counter() - start


async def measure_all(model: str, setting: Setting, plan: Plan, count: int) -> Measured:
    measured = Measured()
    async with BatchedEngine(
        model, max_batch_size=8, max_decode_pause_ms=_PAUSE, prompt_cache_bytes=0,
        context_length=2_000_000,
    ) as engine:  # fmt: skip
        for name in CONTROLS[:2]:
            await engine.run_blocking(control, engine, name)
        await beside(engine, plan, "options seen", 3)
        for turn in range(setting.repeats):
            for name in rotated([*NEWCOMERS, *CONTROLS], turn):
                if name in CONTROLS:
                    seconds = await engine.run_blocking(control, engine, name)
                    measured.controls[name].append(seconds)
                    continue
                gap, step = await beside(engine, plan, name, count)
                measured.gaps[name].append(gap)
                measured.steps[name].append(step)
    return measured


def tables(measured: Measured) -> list[str]:
    rows = [
        [name, Spread.of(gaps).text(1, 1e3), Spread.of(measured.steps[name]).text(2, 1e3)]
        for name, gaps in measured.gaps.items()
    ]
    raw = [[name, Spread.of(every).text(2, 1e3)] for name, every in measured.controls.items()]
    return [
        markdown_table(["beside running streams", "longest gap ms", "step ms"], rows),
        markdown_table(["on one thread, between two steps", "ms"], raw),
    ]


def record_of(measured: Measured) -> Record:
    return {
        "longest_gap_seconds": {n: Spread.of(v).record() for n, v in measured.gaps.items()},
        "step_seconds": {n: Spread.of(v).record() for n, v in measured.steps.items()},
        "control_seconds": {n: Spread.of(v).record() for n, v in measured.controls.items()},
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 2.2)
    if made is None:
        return None
    figure, (left, right) = made
    parts = (("longest_gap_seconds", left, "longest gap of a stream, ms"),
             ("control_seconds", right, "at once, on one thread, ms"))  # fmt: skip
    for key, place, label in parts:
        draw_dots(place, {n: Spread.read(v) for n, v in record[key].items()}, label, 1e3)
        log_scale(place, "x")
    left.set_title("The streams that run")
    right.set_title("What would hold them up")
    return figure


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="that run (default 4)")
    parser.add_argument("--requests", type=int, metavar="N", help="with options (default 200)")


async def measure(setting: Setting, model: str) -> None:
    random.seed()  # values that no run before has had compiled
    plan = Plan(setting.own.streams, 0, 0)
    count = setting.own.requests or (20 if setting.quick else 200)
    about = f"{plan.streams} running streams, {count} requests with options"
    report = Report(setting, f"{about}, {setting.repeats} rounds. {INTERVAL}")
    measured = await measure_all(model, setting, plan, count)
    for table in tables(measured):
        report.add(table)
    report.finish(
        {
            "rounds": setting.repeats,
            "streams": plan.streams,
            "requests": count,
            "max_decode_pause_ms": _PAUSE,
            **record_of(measured),
        },
        draw,
    )


def main() -> None:
    setting = parse_setting("newcomers", __doc__, repeats=7, quick_repeats=2, add_own=add_options)
    with model_folder(setting) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
