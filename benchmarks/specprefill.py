"""How much sooner does the first token come when only a part of a long prompt is prefilled?

Two random models of the same width and vocabulary: a target of 15 layers, and a draft
of two. Of the last layer, a prefill computes only keys and values, so that this is 14 layers to
one; what the draft really costs by itself is measured, too, and told. One ``SimpleEngine``
with ``SpecPrefill(draft, threshold=0)``, prompt cache off; each prompt goes in once in full
(``prefill=None``) and once for each share kept, in random order, and new prompts in each round.
"Times shorter" is the time to first token in full over the sparse one, scoring included, within a
round: wall time, and processor seconds of the whole process from the call to its return, which
other work on the machine disturbs less. Of a sparse prefill, "scoring" is from the call to the
end of the draft's work, by progress as the event loop is told; the rest is prefill.
Random weights say nothing about what is worth keeping: this is about time alone, and
``benchmarks.needle`` about the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.draft_pair import DRAFT_LAYERS, LAYERS, draft_pair, widths
from benchmarks.drawing import BLACK, draw_dots, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, parse_setting
from benchmarks.spread import Record, Spread
from mlx_engine import Progress, SimpleEngine, SpecPrefill

KEEPS = (0.1, 0.2, 0.3, 0.5)
LENGTHS = (1024, 2048, 4096)
TARGET_KEEP, TARGET = 0.2, 5.0  # that much shorter for the longest prompt


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall time and the process's processor time."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Clock) -> Clock:
        return Clock(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True, slots=True)
class Run:
    """One prefill.

    Attributes:
        first_token: seconds.
        cpu: processor seconds.
        scoring: of both, the draft's part; 0 in full.
        kept: tokens that the target has read.
    """

    first_token: float
    cpu: float
    scoring: Clock
    kept: int


@dataclass(slots=True)
class Measured:
    """Of one length: runs in full, and by share kept; one a round.

    Attributes:
        draft: the draft's own prefill of the same prompt, as if it were the target.
    """

    full: list[Run] = field(default_factory=list)
    draft: list[Run] = field(default_factory=list)
    sparse: dict[float, list[Run]] = field(default_factory=dict)

    def shorter(self, keep: float) -> Spread:
        """Time to first token, full over sparse, within each round."""
        pairs = zip(self.full, self.sparse[keep], strict=True)
        return Spread.of(full.first_token / run.first_token for full, run in pairs)

    def dearer(self) -> Spread:
        """Processor seconds of the target's full prefill over the draft's, within each round."""
        return Spread.of(a.cpu / b.cpu for a, b in zip(self.full, self.draft, strict=True))

    def shorter_cpu(self, keep: float) -> Spread:
        """The same of processor seconds."""
        pairs = zip(self.full, self.sparse[keep], strict=True)
        return Spread.of(full.cpu / run.cpu for full, run in pairs)


class Watch:
    """Told of progress; knows when the draft has done its work."""

    def __init__(self) -> None:
        self.scored: Clock | None = None
        self._scoring = False

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "score":
            self._scoring = True
        elif self._scoring and self.scored is None:
            self.scored = Clock.now()


async def prefill(engine: SimpleEngine, prompt: list[int], keep: float | None) -> Run:
    """One token after a prefill in full, or after a sparse one."""
    watch, start = Watch(), Clock.now()
    result = await engine.generate(
        prompt,
        max_tokens=1,
        ignore_eos=True,
        prefill=None if keep is None else SpecPrefill(keep=keep, threshold=0),
        on_progress=watch,
    )
    took = Clock.now().since(start)
    if result.notes or (watch.scored is None) != (keep is None):
        raise SystemExit(f"keep {keep}: {result.notes or 'not what was asked for'}")
    return Run(
        result.timings.time_to_first_token,
        took.cpu,
        Clock(0.0, 0.0) if watch.scored is None else watch.scored.since(start),
        len(prompt) if result.usage.kept_tokens is None else result.usage.kept_tokens,
    )


async def measure(
    target: str, draft: str, lengths: Sequence[int], rounds: int
) -> dict[int, Measured]:
    measured = {length: Measured() for length in lengths}
    chooser = random.Random(0)
    strategy = SpecPrefill(draft, threshold=0)
    async with (
        SimpleEngine(target, prefill=strategy, prompt_cache_bytes=0) as engine,
        SimpleEngine(draft, prompt_cache_bytes=0) as alone,
    ):
        ways: list[float | str] = ["full", "draft", *KEEPS]

        async def run(way: float | str, prompt: list[int]) -> Run:
            if isinstance(way, str):
                return await prefill(engine if way == "full" else alone, prompt, None)
            return await prefill(engine, prompt, way)

        for way in ways:  # warm-up
            await run(way, [chooser.randrange(250) for _ in range(600)])
        for _ in range(rounds):
            for length, of_length in measured.items():
                prompt = [chooser.randrange(250) for _ in range(length)]
                for way in chooser.sample(ways, len(ways)):
                    if isinstance(way, str):
                        runs = of_length.full if way == "full" else of_length.draft
                    else:
                        runs = of_length.sparse.setdefault(way, [])
                    runs.append(await run(way, prompt))
    for of_length in measured.values():
        of_length.sparse = dict(sorted(of_length.sparse.items()))
    return measured


def time_table(measured: dict[int, Measured]) -> str:
    rows = []
    for length, of_length in measured.items():
        first = Spread.of(run.first_token for run in of_length.full).text(2)
        cpu = Spread.of(run.cpu for run in of_length.full).text(2)
        rows.append([f"{length}, full", str(length), first, "1", cpu, "1", "-", "-", "-"])
        first = Spread.of(run.first_token for run in of_length.draft).text(2)
        cpu = Spread.of(run.cpu for run in of_length.draft).text(2)
        less = of_length.dearer().text(1)
        rows.append(
            [f"{length}, the draft's own", str(length), first, "-", cpu, less, "-", "-", "-"]
        )
        for keep, runs in of_length.sparse.items():
            rest = [run.first_token - run.scoring.wall for run in runs]
            share = [run.scoring.cpu / run.cpu for run in runs]
            rows.append(
                [
                    f"{length}, keep {keep:.0%}",
                    str(runs[0].kept),
                    Spread.of(run.first_token for run in runs).text(2),
                    of_length.shorter(keep).text(2),
                    Spread.of(run.cpu for run in runs).text(2),
                    of_length.shorter_cpu(keep).text(2),
                    Spread.of(run.scoring.wall for run in runs).text(2),
                    Spread.of(rest).text(2),
                    Spread.of(share).text(2),
                ]
            )
    head = ["prompt tokens", "kept", "first token s", "times shorter", "CPU s", "times less CPU"]
    return markdown_table([*head, "scoring s", "sparse prefill s", "scoring, of CPU"], rows)


def verdict(measured: dict[int, Measured]) -> Record:
    """The project's target, met or missed."""
    length = max(measured)
    wall = measured[length].shorter(TARGET_KEEP).median
    cpu = measured[length].shorter_cpu(TARGET_KEEP).median
    return {
        "what": f"{length} tokens, keep {TARGET_KEEP:.0%}: times shorter",
        "target": TARGET,
        "median_wall": wall,
        "median_cpu": cpu,
        "met_wall": wall >= TARGET,
        "met_cpu": cpu >= TARGET,
    }


def run_record(runs: list[Run]) -> Record:
    return {
        "kept_tokens": [run.kept for run in runs],
        "first_token_seconds": Spread.of(run.first_token for run in runs).record(),
        "cpu_seconds": Spread.of(run.cpu for run in runs).record(),
        "scoring_seconds": Spread.of(run.scoring.wall for run in runs).record(),
        "scoring_cpu_seconds": Spread.of(run.scoring.cpu for run in runs).record(),
    }


def record_of(measured: Measured) -> Record:
    return {
        "full": run_record(measured.full),
        "draft_alone": run_record(measured.draft),
        "cost_ratio_cpu": measured.dearer().record(),
        "sparse": {
            str(keep): {
                **run_record(runs),
                "times_shorter": measured.shorter(keep).record(),
                "times_less_cpu": measured.shorter_cpu(keep).record(),
            }
            for keep, runs in measured.sparse.items()
        },
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 3.2)
    if made is None:
        return None
    figure, axes = made
    for axis, (what, title) in zip(
        axes,
        (("times_shorter", "Time to first token"), ("times_less_cpu", "Processor time")),
        strict=True,
    ):
        rows = {
            f"{length} tokens, keep {float(keep):.0%}": Spread.read(of_keep[what])
            for length, of_length in record["lengths"].items()
            for keep, of_keep in of_length["sparse"].items()
        }
        draw_dots(axis, rows, "times less than in full, scoring included")
        axis.set_title(title)
        axis.axvline(1, color=BLACK, linewidth=1)
        axis.set_xlim(left=0)
    axes[1].set_yticks(range(len(rows)), [""] * len(rows))
    return figure


def verdict_text(judged: Record) -> str:
    return (
        f"{judged['what']}: wall {judged['median_wall']:.2f}, CPU "
        f"{judged['median_cpu']:.2f}; target {TARGET}: "
        f"{'met' if judged['met_wall'] else 'missed'} by wall time, "
        f"{'met' if judged['met_cpu'] else 'missed'} by processor time"
    )


def hidden_of(setting: Setting) -> int:
    """How wide the models are."""
    return 256 if setting.own.wide else 64 if setting.quick else 128


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--wide", action="store_true", help="twice as wide, many minutes")


def main() -> None:
    setting = parse_setting(
        "specprefill", __doc__, repeats=3, quick_repeats=1, layers=None, add_own=add_options
    )
    hidden, lengths = hidden_of(setting), (512, 1024) if setting.quick else LENGTHS
    about = f"Llama, hidden {hidden}, {LAYERS} layers against {DRAFT_LAYERS}"
    report = Report(setting, f"{about}; {setting.repeats} rounds. {INTERVAL}")
    with draft_pair(hidden) as (target, draft):
        measured = asyncio.run(measure(target, draft, lengths, setting.repeats))
    judged = verdict(measured)
    report.add(time_table(measured))
    report.add(verdict_text(judged))
    found = {
        "rounds": setting.repeats,
        "layers": {"target": LAYERS, "draft": DRAFT_LAYERS},
        "widths": widths(hidden),
        "lengths": {str(length): record_of(of_length) for length, of_length in measured.items()},
        "target": judged,
    }
    report.finish(found, draw)


if __name__ == "__main__":
    main()
