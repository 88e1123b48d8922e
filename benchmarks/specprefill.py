"""How much sooner does the first token come when only a part of a long prompt is prefilled?

    python -m benchmarks.specprefill            time, with random models
    python -m benchmarks.specprefill --needle   what is kept, with the demo model

**Time.** Two random models of the same width and vocabulary: a target of 15 layers, and a draft
of two. Of the last layer, a prefill computes only keys and values, so that this is 14 layers to
one; what the draft really costs by itself is measured, too, and told. One ``SimpleEngine``
with ``SpecPrefill(draft, threshold=0)``, prompt cache off; each prompt goes in once in full
(``prefill=None``) and once for each share kept, in random order, and new prompts in each round.
"Times shorter" is the time to first token in full over the sparse one, scoring included, within a
round: wall time, and processor seconds of the whole process from the call to its return, which
other work on the machine disturbs less. Of a sparse prefill, "scoring" is from the call to the
end of the draft's work, by progress as the event loop is told; the rest is prefill.
Random weights say nothing about what is worth keeping: this is about time alone.

**Needle.** Four haystacks of about 1,000 tokens, in each a number for a city, at another depth,
which a question asks for at the end, as a chat. The demo model (SmolLM2-135M) is its own draft,
since it has no smaller sibling: its scoring costs as much as a full prefill, so there is no time
to be won. Told is whether the fact's tokens are among those kept, whether the number's are, and
whether it is in the answer, full and sparse. Chance would keep as much of the fact as of the
whole. A few cases with a very small model: they show that the path works from end to end, and no
more about quality than that.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import (
    Spread,
    describe,
    draw_dots,
    machine,
    markdown_table,
    new_figure,
    write_json,
)
from mlx_engine import Progress, SimpleEngine, SpecPrefill

_ROOT = Path(__file__).resolve().parent.parent
LAYERS, DRAFT_LAYERS = 15, 2  # less the last one, 14 to 1
KEEPS = (0.1, 0.2, 0.3, 0.5)
LENGTHS = (1024, 2048, 4096)
TARGET_KEEP, TARGET = 0.2, 5.0  # that much shorter for the longest prompt

NEEDLE_KEEPS = (0.2, 0.3)
NEEDLE_TOKENS = 1000
CASES = {"Lisbon": 0.15, "Nairobi": 0.4, "Oslo": 0.65, "Lima": 0.9}  # at this depth
NUMBERS = {"Lisbon": "48213", "Nairobi": "70956", "Oslo": "31684", "Lima": "92507"}


def widths(hidden: int) -> dict[str, int]:
    """Of both models, by what config.json calls them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
    }


@contextmanager
def random_models(hidden: int) -> Iterator[tuple[Path, Path]]:
    """Target and draft, which live as long as the ``with`` block."""
    with tempfile.TemporaryDirectory() as parent:
        folders = Path(parent, "target"), Path(parent, "draft")
        for folder, layers in zip(folders, (LAYERS, DRAFT_LAYERS), strict=True):
            program = [sys.executable, "-m", "tests.tiny", str(folder), "--layers", str(layers)]
            # In a process of its own, since making it is MLX work.
            program += ["--other", json.dumps(widths(hidden))]
            subprocess.run(program, cwd=_ROOT, check=True)
        yield folders


# ── time ────────────────────────────────────────────────────────────────────────────────────


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


async def measure(target: Path, draft: Path, options: Namespace) -> dict[int, Measured]:
    measured = {length: Measured() for length in options.lengths}
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
        for _ in range(options.rounds):
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


def verdict(measured: dict[int, Measured]) -> dict[str, Any]:
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


def run_record(runs: list[Run]) -> dict[str, Any]:
    return {
        "kept_tokens": [run.kept for run in runs],
        "first_token_seconds": Spread.of(run.first_token for run in runs).record(),
        "cpu_seconds": Spread.of(run.cpu for run in runs).record(),
        "scoring_seconds": Spread.of(run.scoring.wall for run in runs).record(),
        "scoring_cpu_seconds": Spread.of(run.scoring.cpu for run in runs).record(),
    }


def record_of(measured: Measured) -> dict[str, Any]:
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


def plot(out: Path, measured: dict[int, Measured]) -> None:
    made = new_figure(2)
    if made is None:
        return
    figure, axes = made
    for axis, shorter, label in zip(
        axes, ("shorter", "shorter_cpu"), ("first token", "processor time"), strict=True
    ):
        rows = {
            f"{length}, keep {keep:.0%}": getattr(of_length, shorter)(keep)
            for length, of_length in measured.items()
            for keep in of_length.sparse
        }
        draw_dots(axis, rows, f"{label}: full over sparse, scoring included")
        axis.axvline(TARGET, color="grey", linewidth=1)
    figure.savefig(out / "specprefill.png", dpi=150)


def main_time(options: Namespace) -> None:
    what = machine()
    with random_models(options.hidden) as (target, draft):
        measured = asyncio.run(measure(target, draft, options))
    judged = verdict(measured)
    print(
        f"{describe(what)}\nLlama, hidden {options.hidden}, {LAYERS} layers against "
        f"{DRAFT_LAYERS}. {options.rounds} rounds. Numbers are median [min, max].\n\n"
        f"{time_table(measured)}\n\n{judged['what']}: wall {judged['median_wall']:.2f}, CPU "
        f"{judged['median_cpu']:.2f}; target {TARGET}: "
        f"{'met' if judged['met_wall'] else 'missed'} by wall time, "
        f"{'met' if judged['met_cpu'] else 'missed'} by processor time"
    )
    record = {
        "machine": what,
        "quick": options.quick,
        "rounds": options.rounds,
        "layers": {"target": LAYERS, "draft": DRAFT_LAYERS},
        "widths": widths(options.hidden),
        "lengths": {str(length): record_of(of_length) for length, of_length in measured.items()},
        "target": judged,
    }
    write_json(options.out, "specprefill", record)
    plot(options.out, measured)


# ── needle ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Needle:
    """One case, in full or with a share kept.

    Attributes:
        keep: ``None`` is in full.
        kept: share of the prompt that the model has read.
        fact: share of the fact's tokens that are among them.
        number: whether all of the number's are.
        answered: whether the number is in the answer.
        answer: what the model said.
    """

    city: str
    depth: float
    prompt: int
    keep: float | None
    kept: float
    fact: float
    number: bool
    answered: bool
    answer: str


def haystack(fact: str, depth: float, sentences: int) -> str:
    """Plain sentences without numbers, and ``fact`` among them."""
    chooser = random.Random(fact)
    who = ("The baker", "A tall sailor", "My neighbour", "The old teacher", "A young painter")
    does = ("walks along", "often talks about", "once described", "never forgets", "paints")
    thing = ("the quiet river", "the market square", "a garden wall", "the harbour", "the forest")
    when = ("in the morning", "when it rains", "after a long day", "in early spring", "on Sundays")
    lines = [
        " ".join(chooser.choice(part) for part in (who, does, thing, when)) + "."
        for _ in range(sentences)
    ]
    lines.insert(round(depth * sentences), fact)
    return " ".join(lines)


@dataclass(frozen=True, slots=True)
class Question:
    """A chat as token ids, and where in it the fact and its number are."""

    prompt: list[int]
    fact: set[int]
    number: set[int]

    @classmethod
    def of(cls, tokenizer: Any, city: str, depth: float) -> Question:
        """With as many sentences as make the chat long enough. On the MLX thread."""
        fact = f"The secret number of {city} is {NUMBERS[city]}."
        ask = f"What is the secret number of {city}? Answer with the number."
        for sentences in range(20, 400, 10):
            text = f"{haystack(fact, depth, sentences)}\n\n{ask}"
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            coded = tokenizer._tokenizer(
                chat, add_special_tokens=False, return_offsets_mapping=True
            )
            if len(coded["input_ids"]) >= NEEDLE_TOKENS:
                break
        places = coded["offset_mapping"]

        def tokens_of(part: str) -> set[int]:
            first = chat.index(part)
            last = first + len(part)
            return {i for i, (a, b) in enumerate(places) if a < last and b > first}

        return cls(list(coded["input_ids"]), tokens_of(fact), tokens_of(NUMBERS[city]))


async def find_needles(options: Namespace) -> list[Needle]:
    found: list[Needle] = []
    strategy = SpecPrefill(threshold=0, report_ranges=True)
    async with SimpleEngine("demo", prefill=strategy, prompt_cache_bytes=0) as engine:
        tokenizer = await engine.run_blocking(lambda: engine._slot.get().tokenizer)
        for city, depth in list(CASES.items())[: 1 if options.quick else None]:
            asked = await engine.run_blocking(Question.of, tokenizer, city, depth)
            for keep in (None, *NEEDLE_KEEPS):
                result = await engine.generate(
                    asked.prompt,
                    max_tokens=16,
                    prefill=None
                    if keep is None
                    else SpecPrefill(keep=keep, threshold=0, report_ranges=True),
                )
                ranges = result.usage.kept_ranges or ((0, len(asked.prompt)),)
                kept = {i for a, b in ranges for i in range(a, b)}
                found.append(
                    Needle(
                        city,
                        depth,
                        len(asked.prompt),
                        keep,
                        len(kept) / len(asked.prompt),
                        len(kept & asked.fact) / len(asked.fact),
                        asked.number <= kept,
                        NUMBERS[city] in result.text.replace(",", ""),
                        result.text.strip(),
                    )
                )
    return found


def needle_table(found: list[Needle]) -> str:
    rows = [
        [
            f"{each.city}, at {each.depth:.0%}",
            str(each.prompt),
            "full" if each.keep is None else f"{each.keep:.0%}",
            f"{each.kept:.0%}",
            f"{each.fact:.0%}",
            "yes" if each.number else "no",
            "yes" if each.answered else "no",
            json.dumps(each.answer[:60]).replace("|", "\\|"),
        ]
        for each in found
    ]
    head = ["fact", "prompt tokens", "keep", "kept of all", "kept of the fact", "number kept"]
    return markdown_table([*head, "number answered", "answer"], rows)


def main_needle(options: Namespace) -> None:
    what = machine()
    found = asyncio.run(find_needles(options))
    print(f"{describe(what)}\nThe demo model, its own draft.\n\n{needle_table(found)}")
    record = {"machine": what, "quick": options.quick, "cases": [asdict(each) for each in found]}
    write_json(options.out, "specprefill_needle", record)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--needle", action="store_true", help="with the demo model")
    parser.add_argument("--quick", action="store_true", help="its numbers are no result")
    parser.add_argument("--full", action="store_true", help="twice as wide, many minutes")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 3")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", metavar="DIR")
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    options.hidden = 256 if options.full else 64 if options.quick else 128
    options.lengths = (512, 1024) if options.quick else LENGTHS
    return options


def main() -> None:
    options = parse()
    (main_needle if options.needle else main_time)(options)


if __name__ == "__main__":
    main()
