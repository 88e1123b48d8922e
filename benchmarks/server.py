"""What does HTTP cost, against the engine in process and against ``mlx_lm.server``?

Speed. 1, 8 and 32 chats are asked at the same moment, with prompts of 30 to 90 tokens, and each
makes the same number of tokens, greedy, as a stream. The texts must be the same in every place but
``mlx_lm.server``, of which the share that is the same is told.

    in process          ``BatchedEngine.stream_chat``
    in process again    the same once more: how far its ratio is from 1 is the noise
    serve               ``mlx-engine serve``, whose engine has a process of its own
    serve --in-process  the same without that
    mlx_lm.server       ``mlx_lm.server``, with room for as many rows

A round asks each of them once at each number, and the order rotates from round to round; ratios are
taken within a round. All are alive all the time, and one is used at a time. Connections are made
before, since a burst of them is more than some servers take at once. The client reads the sockets
itself, and takes JSON apart, which is part of what is measured.

One request: a chat of one token, whole, one after another: seconds more than in process.

Turns: a conversation of an agent's kind, a long first message and then answers and results of
tools, turn by turn: seconds to the first token, and how much of the prompt was in the prompt cache.

A close: clients close their connections in decode, and in a prefill of 6,000 tokens; from there to
the moment when the engine has nothing in work. It is to be compared with a step, or with the
longest chunk: a chunk takes longer the more there is before it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.drawing import BLACK, draw_line, legend_below, new_figure, ticks_at
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.server_places import Place, Told, everywhere, served_here
from benchmarks.setting import Setting, parse_setting, rotated
from benchmarks.spread import Record, Spread
from benchmarks.throughput import add_options, models
from mlx_engine import BatchedEngine
from mlx_engine.outputs import Progress

AT_ONCE = (1, 8, 32)
HERE, THEIRS = "in process", "mlx_lm.server"
TURNS = 8
LONG = 6_000  # tokens of a prompt, and of a message: a token of these models is a character
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens a second of all requests, seconds to the first token (median), and their texts."""

    rate: float
    first: float
    texts: tuple[str, ...]


Runs = dict[int, dict[str, list[Run]]]


def chats(count: int) -> list[list[dict[str, str]]]:
    chooser = random.Random(1)
    words = ["".join(chooser.choices("abcdefghij ", k=chooser.randint(10, 70))) for _ in range(32)]
    return [[{"role": "user", "content": text}] for text in words[:count]]


async def timed(place: Place, number: int, options: dict[str, Any]) -> Run:
    connections = [await place.connect() for _ in range(number)]
    start = time.perf_counter()
    told: list[Told] = await asyncio.gather(
        *(place.stream(*one, **options) for one in zip(chats(number), connections, strict=True))
    )
    seconds = time.perf_counter() - start
    if any(one.tokens != options["max_tokens"] for one in told):
        raise SystemExit(f"answers of {[one.tokens for one in told]} tokens: nothing to compare")
    first = statistics.median(one.first for one in told)
    return Run(sum(one.tokens for one in told) / seconds, first, tuple(one.text for one in told))


async def measure_speed(
    places: dict[str, Place], setting: Setting, at_once: list[int], options: dict[str, Any]
) -> Runs:
    runs: Runs = {number: {name: [] for name in places} for number in at_once}
    for turn in range(-1, setting.repeats):  # the first one is to warm up
        for number in at_once:
            for name in rotated(list(places), turn):
                run = await timed(places[name], number, options)
                if turn >= 0:
                    runs[number][name].append(run)
            if turn >= 0:
                check(runs[number])
    return runs


def check(runs: dict[str, list[Run]]) -> None:
    for name, of_place in runs.items():
        if name != THEIRS and of_place[-1].texts != runs[HERE][-1].texts:
            raise SystemExit(f"{name} has given other texts: nothing to compare")


def ratios(runs: dict[str, list[Run]], name: str, to: str = HERE) -> Spread:
    return Spread.of(a.rate / b.rate for a, b in zip(runs[name], runs[to], strict=True))


def speed_tables(runs: Runs) -> list[str]:
    names = [name for name in next(iter(runs.values())) if name != HERE]
    speed, first = [], []
    for number, by_name in runs.items():
        rate = Spread.of(run.rate for run in by_name[HERE])
        step = number / rate.median
        speed.append(
            [f"{number} ({step * 1e3:.1f} ms a step)", rate.text(0)]
            + [ratios(by_name, name).text(3) for name in names]
            + [ratios(by_name, "serve", THEIRS).text(2)]
        )
        first.append(
            [str(number)]
            + [Spread.of(r.first for r in by_name[name]).text(1, 1e3) for name in (HERE, *names)]
        )
    pairs = [
        (a, b)
        for by_name in runs.values()
        for mine, its in zip(by_name[HERE], by_name[THEIRS], strict=True)
        for a, b in zip(mine.texts, its.texts, strict=True)
    ]
    same = sum(a == b for a, b in pairs) / len(pairs)
    return [
        markdown_table(
            ["streams; tokens/s, of in process", HERE, *names, f"serve, of {THEIRS}"], speed
        ),
        markdown_table(["streams; first token, ms", HERE, *names], first),
        f"{same:.0%} of the texts of {THEIRS} are the same.",
    ]


async def measure_requests(
    places: dict[str, Place], setting: Setting, options: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds of one request more than in process, a list a place with an entry a round."""
    number = 10 if setting.quick else 100
    added: dict[str, list[float]] = {name: [] for name in places if name != HERE}
    (messages,) = chats(1)
    for turn in range(-1, setting.repeats):
        seconds: dict[str, float] = {}
        for name in rotated(list(places), turn):
            start = time.perf_counter()
            for _ in range(number):
                await places[name].whole(messages, **{**options, "max_tokens": 1})
            seconds[name] = (time.perf_counter() - start) / number
        if turn >= 0:
            for name, values in added.items():
                values.append(seconds[name] - seconds[HERE])
    return added


Turns = dict[str, list[list[Told]]]  # by place, a list a round of one a turn


async def measure_turns(
    places: dict[str, Place], setting: Setting, options: dict[str, Any]
) -> Turns:
    found: Turns = {name: [] for name in places if name != "in process again"}
    size = 1_500 if setting.quick else LONG
    for turn in range(setting.repeats):
        for name in rotated(list(found), turn):
            chooser = random.Random(f"{turn}")
            text = "".join(chooser.choices("abcdefghij ", k=size))
            messages = [{"role": "system", "content": text}, {"role": "user", "content": "Go on."}]
            told: list[Told] = []
            for _ in range(TURNS):
                told.append(await places[name].stream(messages, **{**options, "max_tokens": 20}))
                result = "".join(chooser.choices("abcdefghij ", k=200))
                messages += [
                    {"role": "assistant", "content": told[-1].text},
                    {"role": "user", "content": result},
                ]
            found[name].append(told)
    return found


def turns_table(turns: Turns) -> str:
    rows = []
    for number in (1, 2, TURNS):
        cells = [f"{number} ({turns[HERE][0][number - 1].prompt:,} tokens)"]
        for rounds in turns.values():
            first = Spread.of(told[number - 1].first for told in rounds).text(0, 1e3)
            last = rounds[-1][number - 1]
            cells.append(f"{first}, {last.cached / last.prompt:.0%}")
        rows.append(cells)
    return markdown_table(["turn; first token, ms, and cached", *turns], rows)


async def measure_closes(model: str, setting: Setting, options: dict[str, Any]) -> Record:
    """Seconds from a close to an engine with nothing in work, and what a piece of work takes."""
    found: dict[str, list[float]] = {"decode": [], "prefill": []}
    trials = 3 if setting.quick else 20
    chooser = random.Random(2)
    async with (
        BatchedEngine(model, prefill_step_size=CHUNK, prompt_cache_bytes=0) as engine,
        served_here(engine) as place,
    ):
        start = time.perf_counter()
        told = await place.stream([{"role": "user", "content": "x" * LONG}], **options)
        step = (time.perf_counter() - start - told.first) / told.tokens
        chunk = await longest_chunk(engine)
        for trial in range(2 * trials):
            where = "prefill" if trial % 2 else "decode"
            text = f"{trial}" + "x" * (LONG if where == "prefill" else 20)
            more = {**options, "max_tokens": 2_000, "stream": True}
            reader, writer = await place.send([{"role": "user", "content": text}], **more)
            if where == "decode":
                for _ in range(20):
                    await reader.readline()
            else:
                while not engine.stats().running:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(chooser.uniform(0.1, 0.8) * told.first)
            start = time.perf_counter()
            writer.transport.abort()
            while engine.stats().running:
                await asyncio.sleep(0.0002)
            found[where].append(time.perf_counter() - start)
            await asyncio.sleep(0.01)
    seconds = {where: Spread.of(values).record() for where, values in found.items()}
    return {"step_seconds": step, "chunk_seconds": chunk, "free_seconds": seconds}


async def longest_chunk(engine: BatchedEngine) -> float:
    """Seconds of the longest chunk of a long prompt: the last ones take a multiple of the first."""
    ends = [time.perf_counter()]

    def on_progress(progress: Progress) -> None:
        if progress.phase == "prefill":
            ends.append(time.perf_counter())

    said = [{"role": "user", "content": "y" * LONG}]
    await engine.chat(said, max_tokens=1, on_progress=on_progress)
    return max(end - start for start, end in pairwise(ends))


def closes_table(closes: Record) -> str:
    rows = [
        [
            f"in {where}",
            Spread.read(closes["free_seconds"][where]).text(1, 1e3),
            f"{closes[piece] * 1e3:.1f}",
        ]
        for where, piece in (("decode", "step_seconds"), ("prefill", "chunk_seconds"))
    ]
    return markdown_table(
        ["a connection is closed", "until the engine is free, ms", "piece, ms"], rows
    )


def draw(record: Record) -> Any:
    made = new_figure(1, len(record["models"]), 3.2)
    if made is None:
        return None
    figure, axes = made
    for axis, (model, found) in zip(axes, record["models"].items(), strict=True):
        at_once = found["speed"]
        places = [int(number) for number in at_once]
        names = [name for name in at_once[str(places[0])] if name not in (HERE, f"{HERE} again")]
        for series, name in enumerate(names):
            spreads = [Spread.read(at_once[str(n)][name]["ratio_to_in_process"]) for n in places]
            draw_line(axis, places, spreads, name, series=series)
        axis.axhline(1.0, color=BLACK, linewidth=1)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{model} model")
        axis.set_ylabel("tokens/s, of in process")
        ticks_at(axis, places, "streams at once")
    legend_below(figure, axes[0])
    return figure


def record_of(runs: Runs) -> Record:
    return {
        str(number): {
            name: {
                "tokens_per_second": Spread.of(run.rate for run in of_place).record(),
                "ratio_to_in_process": ratios(by_name, name).record(),
                "first_token_seconds": Spread.of(run.first for run in of_place).record(),
            }
            for name, of_place in by_name.items()
        }
        for number, by_name in runs.items()
    }


def turns_record(turns: Turns) -> Record:
    return {
        name: [
            {
                "first_token_seconds": Spread.of(t[n].first for t in rounds).record(),
                "prompt_tokens": rounds[0][n].prompt,
                "cached_tokens": [told[n].cached for told in rounds],
            }
            for n in range(TURNS)
        ]
        for name, rounds in turns.items()
    }


async def measure(model: str, setting: Setting, count: int, report: Report) -> Record:
    at_once = [1, 8] if setting.quick else list(AT_ONCE)
    # No special token, so that no answer ends early, and all of them are text.
    options = {
        "max_tokens": count,
        "temperature": 0,
        "logit_bias": {str(token): -100 for token in range(256, 262)},
    }
    async with everywhere(model) as places:
        runs = await measure_speed(places, setting, at_once, options)
        for table in speed_tables(runs):
            report.add(table)
        added = await measure_requests(places, setting, options)
        head = ["one request, ms more than in process", *added]
        cells = [Spread.of(values).text(2, 1e3) for values in added.values()]
        report.add(markdown_table(head, [["a chat of one token", *cells]]))
        turns = await measure_turns(places, setting, options)
        report.add(turns_table(turns))
    closes = await measure_closes(model, setting, options)
    report.add(closes_table(closes))
    return {
        "tokens_per_request": count,
        "speed": record_of(runs),
        "added_seconds_per_request": {n: Spread.of(v).record() for n, v in added.items()},
        "turns": turns_record(turns),
        "closes": closes,
    }


def main() -> None:
    setting = parse_setting("server", __doc__, repeats=7, quick_repeats=2, add_own=add_options)
    if setting.model is not None:
        raise SystemExit("--model: the tokens that end an answer are those of the random models")
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    found: dict[str, Record] = {}
    with models(setting) as folders:
        for name, folder in folders.items():
            count = setting.own.tokens or (16 if setting.quick else 128 if name == "tiny" else 48)
            report.add(f"Model: {name}; {count} tokens a request.")
            found[name] = asyncio.run(measure(folder, setting, count, report))
    report.finish({"rounds": setting.repeats, "models": found}, draw)


if __name__ == "__main__":
    main()
