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
from argparse import ArgumentParser, Namespace
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.decode_runs import Measured, Run, cpu_seconds, decode_seconds, total_seconds
from benchmarks.decode_ways import TEXTS, WRONG, Raw, Text, Way, decodes
from benchmarks.drawing import BLACK, BLUE, GREY, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, parse_setting
from benchmarks.spread import Record, Spread
from benchmarks.trained import KINDS, code_prompts, random_prompts, trained_folder
from mlx_engine import MTP

PROMPT = 200  # tokens
NEVER_BELOW = 0.97  # of plain, that auto may come down to
AT_LEAST = 1.25  # of plain, that the best MTP of the plain model should reach, greedy
COLD = "MTP auto, cold"
# In the picture: the way, and what it is called there.
SHOWN = {
    "raw": "raw mlx-lm",
    "plain": "plain",
    "draft 2": "DraftModel, 2 tokens",
    "draft auto": "DraftModel, auto",
    "MTP 1": "MTP(1)",
    "MTP 2": "MTP(2)",
    "MTP 3": "MTP(3)",
    "MTP auto": "MTP(), auto",
}
PANELS = ("code greedy", "code T=0.8")


def check(name: str, text: Text, tokens: list[int], expected: list[int]) -> None:
    """The same tokens, or the end."""
    if tokens == expected or (name == "raw" and text.temperature):
        return
    pairs = enumerate(zip(tokens, expected, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(expected)))
    raise SystemExit(
        f"{name} has other tokens than plain from token {common} on: nothing to compare"
    )


async def measure(folder: Path, text: Text, rounds: int, options: Namespace) -> Measured:
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
            tokenizer = await engine.run_blocking(lambda: engine._holder.model().tokenizer)
            prompts = code_prompts(tokenizer, options.prompts, PROMPT)
        expected = [(await ways["plain"].run(prompt, text, count))[0] for prompt in prompts]
        for name, way in ways.items():  # warm-up
            check(name, text, (await way.run(prompts[0], text, count))[0], expected[0])
        for turn in range(rounds):
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


def verdicts(models: dict[str, dict[str, Measured]]) -> list[Record]:
    """The project's targets, met or missed, by median ratios."""
    found: list[Record] = []

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


def verdict_table(found: list[Record]) -> str:
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


def record_of(measured: Measured) -> Record:
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


def draw(record: Record) -> Any:
    models = record["models"]
    made = new_figure(len(models), len(PANELS), 0.4 + 2.6 * len(models))
    if made is None:
        return None
    figure, axes = made
    panels = [(model, title) for model in models for title in PANELS]
    for place, (model, title) in enumerate(panels):
        axis = axes[place]
        draw_rates(axis, models[model][title])
        axis.set_title(f"{model} model, {title}")
        if place % len(PANELS):
            axis.set_yticks(range(len(SHOWN)), [""] * len(SHOWN))
    for axis in axes[-len(PANELS) :]:
        axis.set_xlabel("tokens/s while decoding")
    return figure


def draw_rates(axis: Any, ways: Record) -> None:
    """A bar to the median, a dot for each run, and how many of the proposals were accepted."""
    rates = [Spread.read(ways[name]["decode_tokens_per_second"]) for name in SHOWN]
    end = max(max(rate.values) for rate in rates)
    for place, (name, rate) in enumerate(zip(SHOWN, rates, strict=True)):
        proposes, accepted = name not in ("raw", "plain"), ways[name]["acceptance_rate"]
        axis.barh(place, rate.median, 0.62, color=BLUE if proposes else GREY, alpha=0.55)
        axis.plot(rate.values, [place] * len(rate.values), ".", color=BLACK, alpha=0.5)
        if proposes:
            said = "none proposed" if accepted is None else f"{accepted:.0%} accepted"
            axis.text(end * 1.04, place, said, va="center", fontsize=8)
    plain = Spread.read(ways["plain"]["decode_tokens_per_second"]).median
    axis.axvline(plain, color=BLACK, linewidth=1)
    axis.set_yticks(range(len(SHOWN)), list(SHOWN.values()))
    axis.set_ylim(len(SHOWN) - 0.5, -0.5)
    axis.set_xlim(0, end * 1.42)
    axis.grid(visible=False, axis="y")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, metavar="N", help="of an answer (default 192)")
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="of each text, up to 6 (default 3)"
    )
    parser.add_argument("--model", choices=[*KINDS, "both"], default="both")


def options_of(setting: Setting) -> Namespace:
    """Its own options, each with a value."""
    options = setting.own
    for name, quick, usual, least in (("tokens", 48, 192, 8), ("prompts", 1, 3, 1)):
        if getattr(options, name) is None:
            setattr(options, name, quick if setting.quick else usual)
        if getattr(options, name) < least:
            raise SystemExit(f"--{name} must be {least} or more")
    return options


def main() -> None:
    setting = parse_setting(
        "decode", __doc__, repeats=5, quick_repeats=1, layers=None, add_own=add_options
    )
    options = options_of(setting)
    about = f"{setting.repeats} rounds of {options.prompts} prompts of {PROMPT} tokens"
    report = Report(setting, f"{about}, {options.tokens} tokens an answer. {INTERVAL}")
    models: dict[str, dict[str, Measured]] = {}
    for kind in KINDS if options.model == "both" else [options.model]:
        models[kind] = {}
        with trained_folder(kind) as folder:
            for title in PANELS if setting.quick else TEXTS:
                run = measure(folder, TEXTS[title], setting.repeats, options)
                measured = asyncio.run(run)
                models[kind][title] = measured
                report.add(table(measured, f"{kind}, {title}"))
    judged = verdicts(models)
    report.add(cycle_table(models))
    report.add(verdict_table(judged))
    found = {
        "rounds": setting.repeats,
        "prompts": options.prompts,
        "prompt_tokens": PROMPT,
        "tokens": options.tokens,
        "models": {
            model: {title: record_of(measured) for title, measured in texts.items()}
            for model, texts in models.items()
        },
        "targets": judged,
    }
    report.finish(found, draw)


if __name__ == "__main__":
    main()
