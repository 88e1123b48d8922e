"""How many tokens a second does speculative decoding get, against one token after another?

The two trained models of the tests, one request at a time, prompt cache off. Every way goes over
the same MLX thread. Its tokens are compared with plain's, greedy and seeded: a run in which they
differ fails (raw has no seeds of ours, so that only its greedy tokens are compared).

    raw           ``mlx_lm.generate.generate_step`` in a plain loop on the MLX thread, no text
    plain         ``SimpleEngine`` with ``decode=None``: what ratios are to
    plain again   another one: how far its ratio is from 1 is the noise of this machine
    MTP 1, 2, 3   ``decode=MTP(depth)``, the model's own trained head
    MTP auto      ``decode=MTP()``, warm: it has answered one request before
    MTP auto, cold      the first request of a new engine
    MTP auto, wrong head   the head's inputs are exchanged, so that it is hardly ever right
    draft 2, auto       ``DraftModel`` of three of the model's own eight layers, not trained any
                        further: as there is no smaller sibling, a poor one, and dear
    small draft auto    the same of one layer (plain) or two (hybrid): cheaper, and poorer
    itself auto         the model as its own draft: nothing is rejected, and nothing can be won

What they go on with:

    code greedy         source of Python's standard library, which is what the models have
                        learned, from modules that training left out
    code T=0.8          the same, seeded
    hostile             random token ids, temperature 1.2, seeded: the least that is accepted

A round runs every way once with each prompt, in random order, and ratios are taken within one
round and prompt. They are of speeds: above 1 is faster than plain. "Decode" is wall time from the
first token to the last (which flatters a way whose first cycle gives several tokens, by less than
one token); "all" is wall time from the call to its return, the prefill of the prompt included;
"CPU" is processor seconds of the whole process over the same time, which other work on the
machine disturbs less, but which also counts threads of MLX that only wait.

"Cycles by depth" is how many of a way's cycles proposed 0, 1, 2, 3, 4 tokens: what ``auto`` has
chosen. A verification is a cycle with proposals; the tokens that it gives are those accepted and
one more.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import transformers
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from benchmarks.report import (
    Spread,
    describe,
    draw_dots,
    machine,
    markdown_table,
    new_figure,
    write_json,
)
from benchmarks.trained import KINDS, code_prompts, random_prompts, trained_folder
from mlx_engine import MTP, DraftModel, SimpleEngine
from mlx_engine.config import Decode

PROMPT = 200  # tokens
NEVER_BELOW = 0.97  # of plain, that auto may come down to
AT_LEAST = 1.25  # of plain, that the best MTP of the plain model should reach, greedy
COLD = "MTP auto, cold"
WRONG = "MTP auto, wrong head"


@dataclass(frozen=True, slots=True)
class Text:
    """What is to be gone on with, and how.

    Attributes:
        hostile: random prompts.
        temperature: 0 is greedy.
    """

    hostile: bool
    temperature: float

    @property
    def options(self) -> dict[str, Any]:
        """For a request."""
        return {"temperature": self.temperature, "seed": 7} if self.temperature else {}


TEXTS = {
    "code greedy": Text(hostile=False, temperature=0.0),
    "code T=0.8": Text(hostile=False, temperature=0.8),
    "hostile": Text(hostile=True, temperature=1.2),
}


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle: proposals, of which accepted, and seconds."""

    depth: int
    accepted: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """One request.

    Attributes:
        decode: seconds from the first token to the last.
        total: seconds from the call to its return.
        cpu: processor seconds of the process over the same time.
        proposed: tokens.
        accepted: of them.
        cycles: of its decoding, but for the last one; none where nothing is proposed ever.
    """

    decode: float
    total: float
    cpu: float
    proposed: int = 0
    accepted: int = 0
    cycles: tuple[Cycle, ...] = ()


@dataclass(slots=True)
class Measured:
    """Of one model and text: runs by way, one a round and prompt, and plain's beside each."""

    tokens: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    plain: dict[str, list[Run]] = field(default_factory=dict)

    def add(self, name: str, run: Run, plain: Run) -> None:
        """A run, and plain's of the same round and prompt."""
        self.runs.setdefault(name, []).append(run)
        self.plain.setdefault(name, []).append(plain)

    def speed(self, name: str, of: Callable[[Run], float]) -> Spread:
        """Of plain's, within each round and prompt."""
        pairs = zip(self.runs[name], self.plain[name], strict=True)
        return Spread.of(of(plain) / of(run) for run, plain in pairs)

    def rate(self, name: str) -> Spread:
        """Tokens a second while decoding."""
        return Spread.of((self.tokens - 1) / run.decode for run in self.runs[name])

    def cycles(self, name: str) -> list[Cycle]:
        """Of all runs."""
        return [cycle for run in self.runs[name] for cycle in run.cycles]

    def acceptance(self, name: str) -> float | None:
        """Accepted of proposed tokens, all runs together."""
        proposed = sum(run.proposed for run in self.runs[name])
        accepted = sum(run.accepted for run in self.runs[name])
        return accepted / proposed if proposed else None

    def per_verification(self, name: str) -> float | None:
        """Tokens that a cycle with proposals gives."""
        given = [cycle.accepted + 1 for cycle in self.cycles(name) if cycle.depth]
        return statistics.mean(given) if given else None

    def by_depth(self, name: str) -> dict[int, list[Cycle]]:
        """Cycles by how many tokens they proposed."""
        found: dict[int, list[Cycle]] = {}
        for cycle in self.cycles(name):
            found.setdefault(cycle.depth, []).append(cycle)
        return dict(sorted(found.items()))


def decode_seconds(run: Run) -> float:
    return run.decode


def total_seconds(run: Run) -> float:
    return run.total


def cpu_seconds(run: Run) -> float:
    return run.cpu


class Way:
    """An engine that answers.

    Args:
        engine: running.
        name: of the way.
    """

    def __init__(self, engine: SimpleEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._cycles: list[Cycle] = []

    @classmethod
    async def start(cls, stack: AsyncExitStack, name: str, model: Path, decode: Decode) -> Way:
        """Start an engine, which stops with the stack."""
        engine = SimpleEngine(model, decode=decode, prompt_cache_bytes=0)
        way = cls(await stack.enter_async_context(engine), name)
        await engine.run_blocking(way._watch)
        return way

    def _watch(self) -> None:
        """Note what the engine's chooser of depths is told."""
        speculation = self._engine._slot.space().equipment.speculation
        if speculation is None:
            return
        tell = speculation.chooser.record

        def record(depth: int, seconds: float, accepted: int) -> None:
            self._cycles.append(Cycle(depth, accepted, seconds))
            tell(depth, seconds, accepted)

        speculation.chooser.record = record  # type: ignore[method-assign]

    async def run(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], Run]:
        """One request: its tokens, and what it took."""
        self._cycles.clear()
        cpu, start = time.process_time(), time.perf_counter()
        result = await self._engine.generate(
            prompt, max_tokens=count, ignore_eos=True, **text.options
        )
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        if result.notes and self._name != WRONG:
            raise SystemExit(f"{self._name}: {' '.join(result.notes)}")
        timings = result.timings
        run = Run(
            timings.decode,
            total,
            cpu,
            timings.draft_tokens,
            timings.accepted_tokens,
            tuple(self._cycles),
        )
        return list(result.tokens), run


class Raw(Way):
    """mlx_lm's own step, with the very model that the engine uses."""

    async def run(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], Run]:
        """One request: its tokens, and what it took."""
        cpu, start = time.process_time(), time.perf_counter()
        tokens, decode = await self._engine.run_blocking(self._generate, prompt, text, count)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        return tokens, Run(decode, total, cpu)

    def _generate(self, prompt: list[int], text: Text, count: int) -> tuple[list[int], float]:
        """On the MLX thread."""
        tokens: list[int] = []
        first = last = 0.0
        for token, _ in generate_step(
            mx.array(prompt),
            self._engine._slot.get().model,
            max_tokens=count,
            sampler=make_sampler(temp=text.temperature),
        ):
            last = time.perf_counter()
            first = first or last
            tokens.append(token)
        mx.synchronize()  # a step more has begun; the next way must not wait for it
        return tokens, last - first


def decodes(folder: Path) -> dict[str, Decode]:
    """How each way decodes, by its name."""
    return {
        "plain": None,
        "plain again": None,
        "MTP 1": MTP(1),
        "MTP 2": MTP(2),
        "MTP 3": MTP(3),
        "MTP auto": MTP(),
        WRONG: MTP(head=folder / "wrong_head.safetensors"),
        "draft 2": DraftModel(folder / "medium", num_draft_tokens=2),
        "draft auto": DraftModel(folder / "medium"),
        "small draft auto": DraftModel(folder / "small"),
        "itself auto": DraftModel(folder / "model"),
    }


def check(name: str, text: Text, tokens: list[int], expected: list[int]) -> None:
    """The same tokens, or the end."""
    if tokens == expected or (name == "raw" and text.temperature):
        return
    pairs = enumerate(zip(tokens, expected, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(expected)))
    raise SystemExit(
        f"{name} has other tokens than plain from token {common} on: nothing to compare"
    )


async def measure(folder: Path, text: Text, options: Namespace) -> Measured:
    """One model and text, with engines of its own, so that each learns from this text alone."""
    measured = Measured(options.tokens)
    model, count = folder / "model", options.tokens
    chooser = random.Random(0)
    async with AsyncExitStack() as stack:
        ways = {
            name: await Way.start(stack, name, model, decode)
            for name, decode in decodes(folder).items()
        }
        engine = ways["plain"]._engine
        ways["raw"] = Raw(engine, "raw")
        if text.hostile:
            prompts = random_prompts(options.prompts, PROMPT)
        else:
            tokenizer = await engine.run_blocking(lambda: engine._slot.get().tokenizer)
            prompts = code_prompts(tokenizer, options.prompts, PROMPT)
        expected = [(await ways["plain"].run(prompt, text, count))[0] for prompt in prompts]
        for name, way in ways.items():  # warm-up
            check(name, text, (await way.run(prompts[0], text, count))[0], expected[0])
        for turn in range(options.rounds):
            for place, prompt in enumerate(prompts):
                runs: dict[str, Run] = {}
                names = [*ways, *([COLD] if place == turn % len(prompts) else [])]
                for name in chooser.sample(names, len(names)):
                    async with AsyncExitStack() as short:
                        way = (
                            await Way.start(short, name, model, MTP())
                            if name == COLD
                            else ways[name]
                        )
                        tokens, runs[name] = await way.run(prompt, text, count)
                    check(name, text, tokens, expected[place])
                for name, run in runs.items():
                    measured.add(name, run, runs["plain"])
    order = ["raw", *decodes(folder)]
    order.insert(order.index("MTP auto") + 1, COLD)
    measured.runs = {name: measured.runs[name] for name in order}
    return measured


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(measured: Measured, title: str) -> str:
    rows = []
    for name in measured.runs:
        cycles = {depth: len(found) for depth, found in measured.by_depth(name).items()}
        every = max(sum(cycles.values()), 1)
        share = [f"{cycles.get(depth, 0) / every:.0%}" for depth in range(5)]
        rows.append(
            [
                name,
                measured.rate(name).text(0),
                measured.speed(name, decode_seconds).text(2),
                measured.speed(name, total_seconds).text(2),
                measured.speed(name, cpu_seconds).text(2),
                number(measured.acceptance(name), 2),
                number(measured.per_verification(name), 2),
                " ".join(share) if cycles else "-",
            ]
        )
    head = [title, "tokens/s", "of plain: decode", "all", "CPU", "accepted"]
    return markdown_table([*head, "tokens a verification", "cycles by depth 0 1 2 3 4"], rows)


def cycle_table(models: dict[str, dict[str, Measured]]) -> str:
    """What a cycle costs, by its depth: with the head, and with the draft of three layers."""
    rows = []
    for model, texts in models.items():
        for title, measured in texts.items():
            for family in ("MTP", "draft"):
                times: dict[int, list[float]] = {}
                for name in measured.runs:
                    if name.startswith(family) and name != WRONG:
                        for depth, cycles in measured.by_depth(name).items():
                            times.setdefault(depth, []).extend(c.seconds for c in cycles)
                cells = [
                    f"{statistics.median(times[depth]) * 1e3:.2f}" if depth in times else "-"
                    for depth in range(5)
                ]
                rows.append([f"{model}, {title}, {family}", *cells])
    return markdown_table(["median ms of a cycle of depth", "0", "1", "2", "3", "4"], rows)


def verdicts(models: dict[str, dict[str, Measured]]) -> list[dict[str, Any]]:
    """The project's targets, met or missed, by median ratios."""
    found: list[dict[str, Any]] = []

    def judge(what: str, target: float, measured: Measured, name: str) -> None:
        for kind, of in (("decode", decode_seconds), ("CPU", cpu_seconds)):
            value = measured.speed(name, of).median
            met = value >= target
            found.append({"what": f"{what}, {kind}", "target": target, "median": value, "met": met})

    if "plain" in models:
        measured = models["plain"]["code greedy"]
        best = max(
            ("MTP 1", "MTP 2", "MTP 3", "MTP auto"),
            key=lambda name: measured.speed(name, decode_seconds).median,
        )
        judge(f"plain, code greedy, best MTP ({best})", AT_LEAST, measured, best)
    for model, texts in models.items():
        for title, measured in texts.items():
            for name in measured.runs:
                if "auto" in name and name != COLD:
                    judge(f"{model}, {title}, {name}", NEVER_BELOW, measured, name)
    return found


def verdict_table(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            each["what"],
            f"{each['target']}",
            f"{each['median']:.3f}",
            "" if each["met"] else "missed",
        ]
        for each in found
    ]
    return markdown_table(["target (not for the cold one)", "at least", "median", ""], rows)


def record_of(measured: Measured) -> dict[str, Any]:
    return {
        name: {
            "decode_tokens_per_second": measured.rate(name).record(),
            "speed_of_plain_decode_wall": measured.speed(name, decode_seconds).record(),
            "speed_of_plain_request_wall": measured.speed(name, total_seconds).record(),
            "speed_of_plain_request_cpu": measured.speed(name, cpu_seconds).record(),
            "cpu_seconds_per_request": Spread.of(run.cpu for run in runs).record(),
            "acceptance_rate": measured.acceptance(name),
            "tokens_per_verification": measured.per_verification(name),
            "cycles_by_depth": {
                str(depth): {
                    "count": len(cycles),
                    "median_seconds": statistics.median(c.seconds for c in cycles),
                }
                for depth, cycles in measured.by_depth(name).items()
            },
        }
        for name, runs in measured.runs.items()
    }


def plot(out: Path, models: dict[str, dict[str, Measured]]) -> None:
    made = new_figure(sum(map(len, models.values())))
    if made is None:
        return
    figure, axes = made
    panels = [(model, *each) for model, texts in models.items() for each in texts.items()]
    for axis, (model, title, measured) in zip(axes, panels, strict=True):
        shown = {name: measured.speed(name, decode_seconds) for name in measured.runs}
        del shown["plain"]
        draw_dots(axis, shown, f"decoding speed, of plain: {model}, {title}")
        for line in (NEVER_BELOW, 1.0):
            axis.axvline(line, color="grey", linewidth=1)
    figure.savefig(out / "decode.png", dpi=150)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute; its numbers are no result")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 5")
    parser.add_argument("--tokens", type=int, metavar="N", help="of an answer (default 192)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="of each text, up to 6 (default 3)"
    )
    parser.add_argument("--model", choices=[*KINDS, "both"], default="both")
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR")
    options = parser.parse_args()
    for name, quick, usual in (("rounds", 1, 5), ("tokens", 48, 192), ("prompts", 1, 3)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
        if getattr(options, name) < (8 if name == "tokens" else 1):
            parser.error(f"--{name} is too small")
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    what = machine()
    print(
        f"{describe(what)}\n{options.rounds} rounds of {options.prompts} prompts of {PROMPT} "
        f"tokens, {options.tokens} tokens an answer. Numbers are median [min, max].",
        flush=True,
    )
    models: dict[str, dict[str, Measured]] = {}
    for kind in KINDS if options.model == "both" else [options.model]:
        models[kind] = {}
        with trained_folder(kind) as folder:
            for title, text in TEXTS.items():
                measured = asyncio.run(measure(folder, text, options))
                models[kind][title] = measured
                print(f"\n{table(measured, f'{kind}, {title}')}", flush=True)
    judged = verdicts(models)
    print(f"\n{cycle_table(models)}\n\n{verdict_table(judged)}")
    record = {
        "machine": what,
        "quick": options.quick,
        "rounds": options.rounds,
        "prompts": options.prompts,
        "prompt_tokens": PROMPT,
        "tokens": options.tokens,
        "models": {
            model: {title: record_of(measured) for title, measured in texts.items()}
            for model, texts in models.items()
        },
        "targets": judged,
    }
    write_json(options.out, "decode", record)
    plot(options.out, models)


if __name__ == "__main__":
    main()
