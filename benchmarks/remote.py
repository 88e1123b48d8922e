"""What does an engine elsewhere cost, what does it spare the event loop, how soon is its end known?

Speed. Requests are submitted at the same moment, with prompts of 16 to 64 tokens, and each
makes the same number of tokens, greedy: as streams, each read by a task of its own, and as
whole answers. The tokens must be the same everywhere.

    in process        ``BatchedEngine``
    in process again  the same once more: how far its ratio is from 1 is the noise
    ProcessEngine     a ``BatchedEngine`` in a child process
    RemoteEngine      one in a process of ``mlx-engine host``, over a Unix socket
    RayEngine         one that an actor has started, in a Ray cluster of this machine alone

A round runs each of them once in each shape and number, and the order changes from round to
round. Ratios and differences are taken within a round. All engines are alive all the time, and
one is used at a time. "CPU" is the processor time of this process and of those that do the
engine's work for it, a token; with Ray these are the actor and its child, not Ray's daemons. The
part of it that is not the model's is that of this process, if the model is not in it, of the
actor, and of the event loop beside the model. It is known on Linux only.

What comes from elsewhere costs other processors' time, so that it can be faster than in process
where there are some to spare, and takes more of it in any case.

The other two questions are explained in ``benchmarks.remote_life``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from benchmarks.batch_ways import Load
from benchmarks.drawing import (
    BLACK,
    draw_dots,
    draw_line,
    legend_below,
    log_scale,
    new_figure,
    ticks_at,
)
from benchmarks.remote_life import (
    kills_table,
    lateness_record,
    lateness_table,
    measure_kills,
    measure_lateness,
)
from benchmarks.remote_places import HERE, SHAPES, Run, started_everywhere, timed
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, parse_setting, rotated
from benchmarks.spread import Record, Spread
from benchmarks.throughput import add_options, make_prompts, models

AT_ONCE = (1, 8, 32)

Runs = dict[tuple[int, str], dict[str, list[Run]]]  # by number and shape, and by place


async def measure_speed(model: str, setting: Setting, at_once: list[int], count: int) -> Runs:
    prompts = make_prompts()
    async with started_everywhere(model) as places:
        loads = {number: Load(prompts[:number], count) for number in at_once}
        cases = [(number, shape) for number in at_once for shape in SHAPES]
        runs: Runs = {case: {name: [] for name in places} for case in cases}
        whole = SHAPES["whole answers"]
        expected = {
            number: (await whole(places[HERE].engine, load)).tokens
            for number, load in loads.items()
        }
        for turn in range(-1, setting.repeats):  # the first one is to warm up
            for number, shape in cases:
                names = rotated(list(places), turn)
                for name in names if turn % 2 else reversed(names):
                    load = loads[number]
                    run = await timed(name, places[name], shape, load, expected[number])
                    if turn >= 0:
                        runs[number, shape][name].append(run)
    return runs


def rate(run: Run) -> float:
    return run.rate


def cpu(run: Run) -> float:
    assert run.cpu is not None
    return run.cpu.all


def talk(run: Run) -> float:
    assert run.cpu is not None
    return run.cpu.talk


def first_token(run: Run) -> float:
    return run.first_token


def ratios(runs: dict[str, list[Run]], name: str, of: Callable[[Run], float]) -> Spread:
    """To in process, within each round."""
    return Spread.of(of(a) / of(b) for a, b in zip(runs[name], runs[HERE], strict=True))


def added(runs: dict[str, list[Run]], name: str, of: Callable[[Run], float]) -> Spread:
    """More than in process, within each round."""
    return Spread.of(of(a) - of(b) for a, b in zip(runs[name], runs[HERE], strict=True))


def has_cpu(runs: Runs) -> bool:
    return all(
        run.cpu is not None
        for by_name in runs.values()
        for of_place in by_name.values()
        for run in of_place
    )


def tables(runs: Runs) -> list[str]:
    others = [name for name in next(iter(runs.values())) if name != HERE]

    def table(
        title: str,
        head: str,
        here: Callable[..., str],
        other: Callable[..., str],
        shapes: Collection[str] = SHAPES,
    ) -> str:
        rows = [
            [f"{number} {shape}", here(by_name[HERE]), *(other(by_name, name) for name in others)]
            for (number, shape), by_name in runs.items()
            if shape in shapes
        ]
        return markdown_table([title, head, *others], rows)

    def median_step(of_place: list[Run]) -> str:
        step = Spread.of(run.step for run in of_place).median
        return f"{Spread.of(map(rate, of_place)).text(0)} ({step * 1e3:.1f} ms a step)"

    def wall_ratio(by_name: dict[str, list[Run]], name: str) -> str:
        return ratios(by_name, name, rate).text(3)

    def cpu_here(of_place: list[Run]) -> str:
        return Spread.of(map(cpu, of_place)).text(0, 1e6)

    def cpu_ratio(by_name: dict[str, list[Run]], name: str) -> str:
        return ratios(by_name, name, cpu).text(3)

    def talk_here(of_place: list[Run]) -> str:
        return Spread.of(map(talk, of_place)).text(0, 1e6)

    def talk_there(by_name: dict[str, list[Run]], name: str) -> str:
        return talk_here(by_name[name])

    def first_here(of_place: list[Run]) -> str:
        return Spread.of(map(first_token, of_place)).text(1, 1e3)

    def first_added(by_name: dict[str, list[Run]], name: str) -> str:
        return added(by_name, name, first_token).text(1, 1e3)

    made = [
        table("tokens/s, of in process", HERE, median_step, wall_ratio),
        table("first token, added ms", f"{HERE}, ms", first_here, first_added, {"streams"}),
    ]
    if has_cpu(runs):
        made.append(table("CPU a token, of in process", f"{HERE}, us", cpu_here, cpu_ratio))
        made.append(table("CPU a token but the model's, us", HERE, talk_here, talk_there))
    return made


def shortened(spread: Spread) -> Spread:
    """With five digits, since there are thousands of them."""
    return Spread.of(float(f"{value:.5g}") for value in spread.values)


def record_of(runs: Runs) -> Record:
    def one(by_name: dict[str, list[Run]], name: str) -> Record:
        of_place = by_name[name]
        known = {
            "tokens_per_second": Spread.of(map(rate, of_place)),
            "ratio_to_in_process": ratios(by_name, name, rate),
            "first_token_seconds": Spread.of(map(first_token, of_place)),
            "added_first_token_seconds": added(by_name, name, first_token),
            "step_seconds": Spread.of(run.step for run in of_place),
        }
        if has_cpu(runs):
            known["cpu_seconds_per_token"] = Spread.of(map(cpu, of_place))
            known["cpu_ratio_to_in_process"] = ratios(by_name, name, cpu)
            known["cpu_seconds_per_token_not_the_models"] = Spread.of(map(talk, of_place))
        return {what: shortened(spread).record() for what, spread in known.items()}

    return {
        f"{number} {shape}": {name: one(by_name, name) for name in by_name}
        for (number, shape), by_name in runs.items()
    }


def draw(record: Record) -> Any:
    models = record["models"]
    made = new_figure(2, len(models), 5.2)
    if made is None:
        return None
    figure, axes = made
    for place, (model, of_model) in enumerate(models.items()):
        draw_ratios(axes[place], of_model["speed"])
        axes[place].set_title(f"{model} model, streams")
        late = of_model["loop_lateness_seconds"]["handed over"]
        below = axes[len(models) + place]
        p99s = {name: Spread.read(state["p99"]) for name, state in late.items()}
        draw_dots(below, p99s, "a callback waits, p99, ms", 1e3)
        if place:
            below.set_yticks(range(len(p99s)), [""] * len(p99s))
        log_scale(below, "x")
    legend_below(figure, axes[0])
    return figure


def draw_ratios(axis: Any, speed: Record) -> None:
    cases = {int(case.split()[0]): one for case, one in speed.items() if case.endswith("streams")}
    names = [name for name in next(iter(cases.values())) if not name.startswith(HERE)]
    for series, name in enumerate(names):
        spreads = [Spread.read(one[name]["ratio_to_in_process"]) for one in cases.values()]
        draw_line(axis, list(cases), spreads, name, series=series)
    axis.axhline(1.0, color=BLACK, linewidth=1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s, of in process")
    ticks_at(axis, list(cases), "requests at once")


def main() -> None:
    setting = parse_setting("remote", __doc__, repeats=9, quick_repeats=2, add_own=add_options)
    at_once = [1, 8] if setting.quick else list(AT_ONCE)
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    found: dict[str, Record] = {}
    with models(setting) as folders:
        for name, folder in folders.items():
            count = setting.own.tokens or (16 if setting.quick else 128 if name == "tiny" else 48)
            runs = asyncio.run(measure_speed(folder, setting, at_once, count))
            report.add(f"Model: {name}; {count} tokens a request.")
            for table in tables(runs):
                report.add(table)
            late = asyncio.run(measure_lateness(folder, setting))
            report.add(lateness_table(late))
            found[name] = {
                "tokens_per_request": count,
                "speed": record_of(runs),
                "loop_lateness_seconds": lateness_record(late),
            }
        kills = asyncio.run(measure_kills(next(iter(folders.values())), setting))
    report.add(kills_table(kills))
    killed = {what: spread.record() for what, spread in kills.spreads().items()}
    report.finish({"rounds": setting.repeats, "models": found, "kill_seconds": killed}, draw)


if __name__ == "__main__":
    main()
