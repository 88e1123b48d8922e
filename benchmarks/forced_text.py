"""How much sooner is a call with long keys there, if what its grammar forces goes in at once?

A call of a tool, greedy, in two ways whose answers are the same:

    at once         text that the grammar leaves no choice about is verified in one forward
    token by token  the masks leave one token at each of those places

For models which write a text as their tokenizer does: one whose tokens are bytes, and the demo
model. A random one with other tokens likes any that the masks allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.constrained import FORCED, PROMPT, measure_ways, ratio
from benchmarks.drawing import BLACK, draw_dots, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, parse_setting
from benchmarks.spread import Record, Spread
from benchmarks.vocabularies import model_of
from mlx_engine import JSONSchema, SimpleEngine
from mlx_engine.generation.speculative import decoder

BYTES = 262  # tokens where each is a byte, with those that are special
CALL = JSONSchema(
    {
        "type": "object",
        "properties": {
            "name": {"const": "replace_text_in_the_file"},
            "arguments": {
                "type": "object",
                "properties": {
                    "absolute_path_of_the_file": {"enum": ["/src/main.py", "/src/other.py"]},
                    "text_that_is_to_be_replaced": {"type": "string", "maxLength": 12},
                    "text_that_comes_in_its_place": {"type": "string", "maxLength": 12},
                    "number_of_replacements": {"enum": [1, 2, 3]},
                    "ask_before_it_is_written": {"type": "boolean"},
                },
                "required": [
                    "absolute_path_of_the_file",
                    "text_that_is_to_be_replaced",
                    "text_that_comes_in_its_place",
                    "number_of_replacements",
                    "ask_before_it_is_written",
                ],
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
)

Calls = dict[str, tuple[dict[str, list[float]], int]]  # seconds by the way, and tokens


async def time_forced(model: str, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of a call by the way, an entry a round; and its tokens."""
    tokens: list[int] = []

    async def call(forced: int = FORCED) -> float:
        decoder._FORCED = forced
        result = await engine.generate(PROMPT, max_tokens=400, constraint=CALL)
        if result.finish_reason != "stop":
            raise SystemExit("a call was not completed: nothing to compare")
        if tokens and tokens != [*result.tokens]:
            raise SystemExit("what is forced has changed the answer: nothing to compare")
        tokens[:] = result.tokens
        return result.timings.total

    ways: dict[str, Callable[[], Awaitable[float]]] = {
        "at once": call,
        "token by token": lambda: call(0),
    }
    async with SimpleEngine(model, prompt_cache_bytes=0) as engine:
        return await measure_ways(ways, repeats), len(tokens)


async def measure(setting: Setting) -> None:
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    calls: Calls = {"the demo model": await time_forced("demo", setting.repeats)}
    with model_of(BYTES, 8) as folder:
        calls["a model of bytes"] = await time_forced(folder, setting.repeats)
    rows = [
        [
            name,
            str(tokens),
            Spread.of(found["at once"]).text(0, 1e3),
            Spread.of(found["token by token"]).text(0, 1e3),
            ratio(found, "at once", "token by token").text(2),
        ]
        for name, (found, tokens) in calls.items()
    ]
    head = ["a call by", "tokens", "at once, ms", "token by token, ms", "of that"]
    report.add(markdown_table(head, rows))
    record = {
        name: {way: Spread.of(each).record() for way, each in found.items()} | {"tokens": tokens}
        for name, (found, tokens) in calls.items()
    }
    report.finish({"rounds": setting.repeats, "call_seconds": record}, draw)


def draw(record: Record) -> Any:
    made = new_figure(1, 1, 2.0)
    if made is None:
        return None
    figure, (place,) = made
    shown: dict[str, Spread] = {}
    for name, found in record["call_seconds"].items():
        pairs = zip(found["at once"]["values"], found["token by token"]["values"], strict=True)
        shown[name] = Spread.of(a / b for a, b in pairs)
    draw_dots(place, shown, "time of a call, of that token by token")
    place.axvline(1.0, color=BLACK, linewidth=1)
    return figure


def main() -> None:
    asyncio.run(
        measure(parse_setting("forced_text", __doc__, repeats=5, quick_repeats=2, layers=None))
    )


if __name__ == "__main__":
    main()
