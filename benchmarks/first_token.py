"""When does the first token come, by the length of the prompt and by what is done about it?

Two random models, a target of 15 layers and a draft of a fourteenth of its cost
(``benchmarks.draft_pair``). Four ways, each with a prompt of its own that is new in each round, in
random order:

    full                      all of the prompt is prefilled
    SpecPrefill               the draft scores it, and the target prefills a fifth of it
    full, half cached         the first half of the prompt is in the prompt cache, since a request
                              has had it as its prompt before; the rest is prefilled
    SpecPrefill, half cached  the same, and the target prefills a fifth of the rest. The draft has
                              not read anything of it before, and reads all of it

Given are the time to first token, from the call to the first token on the MLX thread, and how
many times shorter it is than that of "full" in the same round. Random weights say nothing about
what is worth keeping: this is about time alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.draft_pair import DRAFT_LAYERS, LAYERS, draft_pair, widths
from benchmarks.drawing import draw_line, legend_below, log_scale, new_figure, ticks_at
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import parse_setting
from benchmarks.spread import Record, Spread
from mlx_engine import SimpleEngine, SpecPrefill

KEEP = 0.2
FULL = "full"
WAYS = {  # whether it is sparse, and whether half of the prompt is known
    FULL: (False, False),
    "SpecPrefill": (True, False),
    "full, half cached": (False, True),
    "SpecPrefill, half cached": (True, True),
}
LENGTHS = (512, 1024, 2048, 4096)

Measured = dict[int, dict[str, list[float]]]  # seconds, by length and way, one a round


async def first_token(engine: SimpleEngine, length: int, way: str) -> float:
    """Seconds."""
    sparse, cached = WAYS[way]
    prompt = [random.randrange(250) for _ in range(length)]
    known = length // 2 if cached else 0
    if known:
        await engine.generate(prompt[:known], max_tokens=1, prefill=None)
    result = await engine.generate(
        prompt,
        max_tokens=1,
        ignore_eos=True,
        prefill=SpecPrefill(keep=KEEP, threshold=0) if sparse else None,
    )
    kept, hit = result.usage.kept_tokens, result.usage.cached_tokens
    if result.notes or (kept is None) == sparse or abs(hit - known) > 1:
        raise SystemExit(f"{way}, {length} tokens: {hit} cached, {kept} kept; {result.notes}")
    return result.timings.time_to_first_token


async def measure(target: str, draft: str, lengths: Sequence[int], rounds: int) -> Measured:
    measured: Measured = {length: {way: [] for way in WAYS} for length in lengths}
    async with SimpleEngine(target, prefill=SpecPrefill(draft, threshold=0)) as engine:
        for way in WAYS:  # warm-up
            await first_token(engine, 600, way)
        for _ in range(rounds):
            for length, ways in measured.items():
                for way in random.sample(list(WAYS), len(WAYS)):
                    ways[way].append(await first_token(engine, length, way))
    return measured


def shorter(ways: dict[str, list[float]], way: str) -> Spread:
    """Than in full, within each round."""
    return Spread.of(full / other for full, other in zip(ways[FULL], ways[way], strict=True))


def table(measured: Measured) -> str:
    rows = []
    for length, ways in measured.items():
        for way, seconds in ways.items():
            times = "1" if way == FULL else shorter(ways, way).text(2)
            rows.append([f"{length} tokens, {way}", Spread.of(seconds).text(3), times])
    return markdown_table(["prompt", "first token s", "times shorter"], rows)


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 3.6)
    if made is None:
        return None
    figure, (left, right) = made
    lengths = [int(length) for length in record["lengths"]]
    for series, way in enumerate(next(iter(record["lengths"].values()))):
        style = "--" if "cached" in way else "-"
        ways = [of_length[way] for of_length in record["lengths"].values()]
        seconds = [Spread.read(one["first_token_seconds"]) for one in ways]
        draw_line(left, lengths, seconds, way, series=series, style=style)
        times = [Spread.read(one["times_shorter"]) for one in ways]
        draw_line(right, lengths, times, way, series=series, style=style)
    log_scale(left, "y")
    left.set_ylabel("time to first token, s")
    legend_below(figure, left)
    right.set_ylabel("times shorter than in full")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        ticks_at(axis, lengths, "prompt tokens")
    return figure


def main() -> None:
    setting = parse_setting("first_token", __doc__, repeats=3, quick_repeats=2, layers=None)
    hidden, lengths = (64, LENGTHS[:2]) if setting.quick else (128, LENGTHS)
    random.seed(0)
    about = f"Llama, hidden {hidden}, {LAYERS} layers against {DRAFT_LAYERS}, keep {KEEP:.0%}"
    report = Report(setting, f"{about}; {setting.repeats} rounds. {INTERVAL}")
    with draft_pair(hidden) as (target, draft):
        measured = asyncio.run(measure(target, draft, lengths, setting.repeats))
    report.add(table(measured))
    found = {
        "rounds": setting.repeats,
        "layers": {"target": LAYERS, "draft": DRAFT_LAYERS},
        "widths": widths(hidden),
        "keep": KEEP,
        "lengths": {
            str(length): {
                way: {
                    "first_token_seconds": Spread.of(seconds).record(),
                    "times_shorter": shorter(ways, way).record(),
                }
                for way, seconds in ways.items()
            }
            for length, ways in measured.items()
        },
    }
    report.finish(found, draw)


if __name__ == "__main__":
    main()
