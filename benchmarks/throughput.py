"""How many tokens a second do many requests at once get, against mlx_lm's own batches?

1, 2, 4, ... 32 requests are submitted at the same moment, with prompts of 16 to 64 tokens, and
each makes the same number of tokens, greedy. The token ids of all requests are compared: a run
in which two ways differ fails. Every way goes over the same MLX thread and the same weights.

    raw         ``mlx_lm.generate.BatchGenerator`` with room for 32 rows: one ``insert``, then
                ``next()`` in a loop that collects the tokens, as one function on the MLX thread
    raw again   the same once more: how far its ratio is from 1 is the noise of this machine
    raw + text  the same, and each token through the row's own streaming detokenizer: what
                anything that answers with text has to do
    generate    ``await asyncio.gather(*(engine.generate(...) for ...))``
    stream      as many tasks as requests, each ``async for chunk in engine.stream_generate(...)``

A round runs each way once at each number of requests, and the order rotates from round to
round. Ratios and differences are taken within a round.

"End to end" is from the submission of all to the completion of the last in the event loop:
prefill and the ways to the MLX thread and back count. "Decode only" is the sum over requests of
the tokens after the first over the time from the first to the last, by a clock on the MLX
thread. The time to first token is from the submission of all to the moment when raw has the
token on the MLX thread, when ``generate`` notes it there, when a stream's reader has its chunk
in the event loop; the median over the requests of a run.

There are two random models, unless ``--model`` names one: the tests', whose steps are so short
that this library's Python is as visible as it can be, and that of ``benchmarks.wide``, whose
steps are long enough for MLX to be what counts, as with a model that somebody uses.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from benchmarks.batch_ways import ROWS, WAYS, Load, raw
from benchmarks.drawing import draw_line, legend_below, new_figure, ticks_at
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting, rotated
from benchmarks.spread import Record, Spread
from benchmarks.wide import wide_folder
from mlx_engine import BatchedEngine

AT_ONCE = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run.

    Attributes:
        rate: tokens a second, end to end.
        decode_rate: tokens a second, decode only.
        first_token: seconds, median over the requests.
        cpu: processor seconds of the whole process, a token.
    """

    rate: float
    decode_rate: float
    first_token: float
    cpu: float


Runs = dict[int, dict[str, list[Run]]]  # by the number of requests, and by the way


def make_prompts() -> list[list[int]]:
    chooser = random.Random(0)
    return [
        [chooser.randrange(64, 154) for _ in range(chooser.randint(16, 64))] for _ in range(ROWS)
    ]


async def timed(name: str, engine: BatchedEngine, load: Load, expected: list[list[int]]) -> Run:
    cpu, start = time.process_time(), time.perf_counter()
    answer = await WAYS[name](engine, load)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    check(name, answer.tokens, expected)
    # mlx_lm has begun a step after the last one; the next run must not wait for it.
    await engine.run_blocking(mx.synchronize)
    rate = sum((load.count - 1) / decode for decode in answer.decode)
    return Run(load.tokens / seconds, rate, statistics.median(answer.first), cpu / load.tokens)


def check(name: str, tokens: list[list[int]], expected: list[list[int]]) -> None:
    """The same tokens, or the end."""
    for place, (got, wanted) in enumerate(zip(tokens, expected, strict=True)):
        if got != wanted:
            common = next(
                (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
                min(len(got), len(wanted)),
            )
            raise SystemExit(
                f"{name}, {len(tokens)} at once: request {place} has other tokens than raw mlx_lm "
                f"from token {common} on ({len(got)} and {len(wanted)}): nothing to compare"
            )


async def measure_model(model: str, setting: Setting, at_once: list[int], count: int) -> Runs:
    runs: Runs = {number: {name: [] for name in WAYS} for number in at_once}
    prompts = make_prompts()
    async with BatchedEngine(model, max_batch_size=ROWS, prompt_cache_bytes=0) as engine:
        loads = {number: Load(prompts[:number], count) for number in at_once}
        expected = {number: (await raw(engine, load)).tokens for number, load in loads.items()}
        widest = max(at_once)
        for number in at_once:  # a request's tokens do not depend on the others, either
            check("raw", expected[number], expected[widest][:number])
        for number, load in loads.items():  # warm-up
            for name in WAYS:
                await timed(name, engine, load, expected[number])
        for turn in range(setting.repeats):
            for number, load in loads.items():
                for name in rotated(list(WAYS), turn):
                    runs[number][name].append(await timed(name, engine, load, expected[number]))
    return runs


def ratios(runs: dict[str, list[Run]], name: str, of: Callable[[Run], float]) -> Spread:
    """To raw, within each round."""
    return Spread.of(of(a) / of(b) for a, b in zip(runs[name], runs["raw"], strict=True))


def added(runs: dict[str, list[Run]], name: str) -> Spread:
    """Seconds a token more than raw, end to end, within each round."""
    pairs = zip(runs[name], runs["raw"], strict=True)
    return Spread.of(1 / a.rate - 1 / b.rate for a, b in pairs)


def end_to_end(run: Run) -> float:
    return run.rate


def decode_only(run: Run) -> float:
    return run.decode_rate


def first_token(run: Run) -> float:
    return run.first_token


def cpu(run: Run) -> float:
    return run.cpu


# In the picture: the way, what it is called there, its colour and its line.
SHOWN = (
    ("raw", "raw mlx-lm BatchGenerator (no text)", 6, "--"),
    ("generate", "engine.generate", 0, "-"),
    ("stream", "engine.stream_generate", 1, "-"),
)
OTHERS = [name for name in WAYS if name != "raw"]


def ratio_table(runs: Runs, title: str, of: Callable[[Run], float]) -> str:
    rows = [
        [
            str(number),
            Spread.of(map(of, by_way["raw"])).text(0),
            *(ratios(by_way, name, of).text(3) for name in OTHERS),
        ]
        for number, by_way in runs.items()
    ]
    return markdown_table(
        [f"at once; {title}", "raw, tokens/s", *(f"{name}, of raw" for name in OTHERS)], rows
    )


def value_table(runs: Runs, title: str, names: list[str], of: Callable[..., str]) -> str:
    rows = [[str(number), *(of(by_way, name) for name in names)] for number, by_way in runs.items()]
    return markdown_table([f"at once; {title}", *names], rows)


def tables(runs: Runs) -> list[str]:
    def first(by_way: dict[str, list[Run]], name: str) -> str:
        return Spread.of(map(first_token, by_way[name])).text(1, 1e3)

    def processor(by_way: dict[str, list[Run]], name: str) -> str:
        return Spread.of(map(cpu, by_way[name])).text(0, 1e6)

    def more(by_way: dict[str, list[Run]], name: str) -> str:
        return added(by_way, name).text(0, 1e6)

    return [
        ratio_table(runs, "end to end", end_to_end),
        ratio_table(runs, "decode only", decode_only),
        value_table(runs, "first token, ms", list(WAYS), first),
        value_table(runs, "added to raw, us a token", OTHERS, more),
        value_table(runs, "CPU, us a token", list(WAYS), processor),
    ]


def record_of(runs: Runs) -> Record:
    return {
        str(number): {
            name: {
                "tokens_per_second": Spread.of(map(end_to_end, of_way)).record(),
                "ratio_to_raw": ratios(by_way, name, end_to_end).record(),
                "added_seconds_per_token": added(by_way, name).record(),
                "decode_tokens_per_second": Spread.of(map(decode_only, of_way)).record(),
                "decode_ratio_to_raw": ratios(by_way, name, decode_only).record(),
                "first_token_seconds": Spread.of(map(first_token, of_way)).record(),
                "cpu_seconds_per_token": Spread.of(map(cpu, of_way)).record(),
            }
            for name, of_way in by_way.items()
        }
        for number, by_way in runs.items()
    }


def draw(record: Record) -> Any:
    made = new_figure(1, len(record["models"]), 3.4)
    if made is None:
        return None
    figure, axes = made
    for axis, (model, of_model) in zip(axes, record["models"].items(), strict=True):
        at_once = of_model["at_once"]
        places = [int(number) for number in at_once]
        for name, label, series, style in SHOWN:
            rates = [Spread.read(ways[name]["tokens_per_second"]) for ways in at_once.values()]
            draw_line(axis, places, rates, label, series=series, style=style)
        step = at_once["1"]["raw"]["decode_tokens_per_second"]["median"]
        axis.set_title(f"{model} model, {1e3 / step:.1f} ms a step alone")
        axis.set_ylabel("tokens/s, of all requests")
        axis.set_ylim(bottom=0)
        ticks_at(axis, places, "requests at once")
    legend_below(figure, axes[0])
    return figure


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--wide",
        action=BooleanOptionalAction,
        default=True,
        help="also measure the wider random model (not with --model)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="that each request makes")


@contextmanager
def models(setting: Setting) -> Iterator[dict[str, str]]:
    """Folders by what to call them."""
    with model_folder(setting) as folder:
        if setting.model is not None:
            yield {"model": folder}
        elif not setting.own.wide:
            yield {"tiny": folder}
        else:
            with wide_folder() as wide:
                yield {"tiny": folder, "wide": wide}


def main() -> None:
    setting = parse_setting("throughput", __doc__, repeats=5, quick_repeats=2, add_own=add_options)
    at_once = [1, 4, 16] if setting.quick else list(AT_ONCE)
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    found: dict[str, Record] = {}
    with models(setting) as folders:
        for name, folder in folders.items():
            # The wide model's steps of 32 rows are ten times as long, and need no more of them.
            count = setting.own.tokens or (16 if setting.quick else 128 if name == "tiny" else 48)
            runs = asyncio.run(measure_model(folder, setting, at_once, count))
            report.add(f"Model: {name}; {count} tokens a request.")
            for table in tables(runs):
                report.add(table)
            found[name] = {"tokens_per_request": count, "at_once": record_of(runs)}
    report.finish({"rounds": setting.repeats, "models": found}, draw)


if __name__ == "__main__":
    main()
