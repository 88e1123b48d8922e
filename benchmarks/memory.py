"""What do requests without a limit cost, on memory for 40, 16, 8 and 4 of them at their longest?

``max_tokens=None`` is what OpenAI's clients send. Such a request may fill the whole context, and
hardly ever does. 32 of them are submitted at the same moment, each of which ends by itself, at a
stop token, after an eighth to a third of the context. They are seeded, and the tokens of all are
compared with those of a run with room for everything: a run in which they differ fails.

    no limit     ``max_tokens=None``
    own limit    ``max_tokens`` is what each of them will make: nobody knows that, so it is the best
                 that reserving a request's limit can do

on ``kv_cache_memory_bytes`` for 40, 16, 8 and 4 KV caches of the whole context. "At once" are the
requests that decode together, most of the time at which somebody looks and at the most; a "pause"
is the longest gap between two tokens of one request after its first, the worst of all requests,
by the times at which its stream gave them; "preempted" is how many had to leave the batch for a
while, as their results tell.

Peak bytes are ``mx.get_peak_memory()`` over a run, less what was active before it: KV caches,
activations, and the copies that mlx-lm makes when a batch grows. Beside it, the most that
``engine.stats().kv_bytes`` and its prompt cache have told, and how much larger the process became.

Then the padding: what one long row costs a batch, with mlx-lm's caches alone, on the MLX thread.

    short        32 rows of few tokens decode together
    one long     31 of them, and one of many tokens: each is padded to the longest
    split        the same in two batches, of 31 and of one, a forward pass each

Last, saving: 4 streams run while a prompt cache of some hundred megabytes is saved, and loaded
again. The longest gap of any stream is compared with the one beside nothing.
"""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.drawing import SERIES, legend_below, new_figure
from benchmarks.padding import KINDS, Padded, measure_padding
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.saving import Beside, measure_saving
from benchmarks.setting import Setting, parse_setting, random_model
from benchmarks.spread import Record, Spread
from benchmarks.unlimited import WAYS, Run, Runs, measure_unlimited

ROWS = 32
BUDGETS = (40, 16, 8, 4)  # KV caches of the whole context
PARTS = ("requests", "padding", "saving")


def text(runs: Sequence[object], name: str, digits: int, scale: float = 1.0) -> str:
    return Spread.of(getattr(run, name) for run in runs).text(digits, scale)


def run_table(runs: Runs, rows: int) -> str:
    head = [
        f"{rows} requests on memory for",
        "tokens/s",
        "of own limit",
        "finished",
        "at once (most)",
        "longest pause, ms",
        "last first token, s",
        "preempted",
    ]
    lines = []
    for budget, by_way in runs.items():
        for way, each in by_way.items():
            of_own = [a.rate / b.rate for a, b in zip(each, by_way["own limit"], strict=True)]
            lines.append(
                [
                    f"{budget} full contexts, {way}",
                    text(each, "rate", 0),
                    Spread.of(of_own).text(2),
                    str(min(run.finished for run in each)),
                    f"{each[0].rows:.0f} ({max(run.most_rows for run in each)})",
                    text(each, "pause", 0, 1e3),
                    text(each, "first", 1),
                    str(max(run.preempted for run in each)),
                ]
            )
    return markdown_table(head, lines)


def byte_table(runs: Runs, full: int) -> str:
    head = ["MB", "may have", "the engine told", "peak, by MLX", "of may have", "process grew"]
    lines = [
        [
            f"{budget} full contexts, {way}",
            f"{budget * full / 1e6:.1f}",
            text(each, "told", 1, 1e-6),
            text(each, "peak", 1, 1e-6),
            Spread.of(run.peak / (budget * full) for run in each).text(2),
            text(each, "grown", 1, 1e-6),
        ]
        for budget, by_way in runs.items()
        for way, each in by_way.items()
    ]
    return markdown_table(head, lines)


def padding_table(padded: dict[int, dict[str, list[Padded]]]) -> str:
    head = ["the long row has", *(f"{kind}, ms a step" for kind in KINDS)]
    head += [f"{kind}, KV MB" for kind in KINDS]
    lines = [
        [
            f"{tokens:,} tokens",
            *(Spread.of(one.step for one in by_kind[kind]).text(1, 1e3) for kind in KINDS),
            *(f"{by_kind[kind][0].nbytes / 1e6:.1f}" for kind in KINDS),
        ]
        for tokens, by_kind in padded.items()
    ]
    return markdown_table(head, lines)


def saving_table(found: dict[str, list[Beside]], entries: int, size: int) -> str:
    head = [
        f"{entries} prompts of {size / 1e6:.0f} MB each, beside 4 streams",
        "longest gap, ms",
        "step before, ms",
        "it takes, s",
    ]
    lines = [
        [way, text(each, "gap", 1, 1e3), text(each, "step", 1, 1e3), text(each, "seconds", 2)]
        for way, each in found.items()
    ]
    return markdown_table(head, lines)


def record_of(runs: Runs) -> Record:
    return {
        str(budget): {
            way: {
                name: Spread.of(getattr(run, name) for run in each).record()
                for name in Run.__dataclass_fields__
            }
            for way, each in by_way.items()
        }
        for budget, by_way in runs.items()
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 3.2)
    if made is None:
        return None
    figure, axes = made
    requests = record["requests"]["budgets"]
    budgets = list(requests)
    for axis, name, label in zip(
        axes, ("rate", "rows"), ("tokens/s, of all requests", "requests at once"), strict=True
    ):
        for series, way in enumerate(WAYS):
            middle = [requests[budget][way][name]["median"] for budget in budgets]
            places = [place + 0.4 * series - 0.2 for place in range(len(budgets))]
            axis.bar(places, middle, 0.36, color=SERIES[series], label=way)
        axis.set_xticks(range(len(budgets)), budgets)
        axis.set_xlabel("full contexts that fit")
        axis.set_ylabel(label)
    legend_below(figure, axes[0])
    return figure


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--context", type=int, metavar="N", help="tokens of the whole context (default 1024)")
    add("--rows", type=int, default=ROWS, metavar="N", help="requests (default 32)")
    add("--budgets", type=int, nargs="+", default=BUDGETS, metavar="N", help="full contexts")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="measure some parts only")


@contextmanager
def model() -> Iterator[str]:
    """With KV caches that weigh more than the model."""
    with random_model(4, num_key_value_heads=2) as folder:
        yield folder


def measure_requests(setting: Setting, report: Report, context: int) -> Record:
    rows, budgets = setting.own.rows, setting.own.budgets
    with model() as folder:
        work = measure_unlimited(folder, context, rows, budgets, setting.repeats)
        runs, full = asyncio.run(work)
    report.add(run_table(runs, rows))
    report.add(byte_table(runs, full))
    return {
        "context": context,
        "bytes_of_a_full_context": full,
        "budgets": record_of(runs),
    }


def measure_rows(setting: Setting, report: Report) -> Record:
    lengths = (1024, 4096) if setting.quick else (1024, 4096, 16_000)
    with model() as folder:
        padded = asyncio.run(measure_padding(folder, lengths, setting.repeats))
    report.add(padding_table(padded))
    return {
        str(tokens): {
            kind: {
                "step_seconds": Spread.of(one.step for one in each).record(),
                "kv_bytes": each[0].nbytes,
            }
            for kind, each in by_kind.items()
        }
        for tokens, by_kind in padded.items()
    }


def measure_files(setting: Setting, report: Report) -> Record:
    entries, tokens = (4, 4_000) if setting.quick else (6, 16_000)
    with random_model(4, num_key_value_heads=2, head_dim=64) as folder:
        found, size = asyncio.run(measure_saving(folder, entries, tokens, setting.repeats))
    report.add(saving_table(found, entries, size))
    ways = {
        way: {
            name: Spread.of(getattr(one, name) for one in each).record()
            for name in Beside.__dataclass_fields__
        }
        for way, each in found.items()
    }
    return {"entries": entries, "bytes_of_an_entry": size, "ways": ways}


def main() -> None:
    setting = parse_setting(
        "memory", __doc__, repeats=3, quick_repeats=1, layers=None, add_own=add_options
    )
    context = setting.own.context or (512 if setting.quick else 1024)
    report = Report(setting, f"{setting.repeats} rounds; a context of {context} tokens. {INTERVAL}")
    found: Record = {"rounds": setting.repeats}
    if "requests" in setting.own.only:
        found["requests"] = measure_requests(setting, report, context)
    if "padding" in setting.own.only:
        found["padding"] = measure_rows(setting, report)
    if "saving" in setting.own.only:
        found["saving"] = measure_files(setting, report)
    report.finish(found, draw if "requests" in found else None)


if __name__ == "__main__":
    main()
