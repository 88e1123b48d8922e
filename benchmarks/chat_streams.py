"""What does taking a chat's answer apart cost, token by token?

One model, one prompt, greedy, the same number of tokens, and the token ids compared: a run in
which they differ fails. The answers are text without calls, which most tokens of any answer are:
the ids of the markers are kept out by ``logit_bias``, in every way alike.

    plain        ``engine.stream_generate`` of the prompt's token ids: all text is content
    plain again  the same once more: how far its ratio is from 1 is the noise of this machine
    chat         ``engine.stream_chat`` of messages that make the same prompt, with tools:
                 reasoning, content and calls are told apart as the text comes
    raw          ``mlx_lm.stream_generate`` of the token ids, as one function on the MLX thread

A round runs each way once, and the order rotates from round to round; ratios and differences are
taken within a round, of the time from the first token to the last.
"""

from __future__ import annotations

import asyncio
import copy
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_logits_processors

from benchmarks.drawing import BLACK, draw_dots, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting, rotated
from benchmarks.spread import Record, Spread
from mlx_engine import SimpleEngine
from mlx_engine.outputs import GenerationResult

MESSAGES = [{"role": "user", "content": "Which files are in this folder?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "description": "Lists the files of a folder.",
            "parameters": {"type": "object", "properties": {"folder": {"type": "string"}}},
        },
    }
]


class Way:
    """What every way needs.

    Args:
        engine: that has started.
        prompt: token ids of the rendered chat.
        markers: token ids that are kept out.
        count: tokens to generate.
    """

    def __init__(
        self, engine: SimpleEngine, prompt: list[int], markers: list[int], count: int
    ) -> None:
        self.engine = engine
        self.prompt = prompt
        self.options: dict[str, Any] = {
            "max_tokens": count,
            "ignore_eos": True,
            "logit_bias": dict.fromkeys(markers, -100.0),
        }

    async def plain(self) -> tuple[list[int], float]:
        async with self.engine.stream_generate(self.prompt, **self.options) as stream:
            async for _ in stream:
                pass
        return told(stream.result)

    async def chat(self) -> tuple[list[int], float]:
        async with self.engine.stream_chat(MESSAGES, tools=TOOLS, **self.options) as stream:
            async for _ in stream:
                pass
        return told(stream.result)

    async def raw(self) -> tuple[list[int], float]:
        return await self.engine.run_blocking(self._raw)

    def _raw(self) -> tuple[list[int], float]:
        """On the MLX thread, and with the very model that the engine uses."""
        loaded = self.engine._holder.model()
        tokenizer = copy.copy(loaded.tokenizer)
        tokenizer.eos_token_ids = []  # what ignore_eos is to the engine
        tokens: list[int] = []
        start = 0.0
        for response in mlx_lm.stream_generate(
            loaded.model,
            tokenizer,
            mx.array(self.prompt),
            max_tokens=self.options["max_tokens"],
            logits_processors=make_logits_processors(self.options["logit_bias"]),
        ):
            start = start or time.perf_counter()
            tokens.append(response.token)
        return tokens, time.perf_counter() - start


def told(result: GenerationResult) -> tuple[list[int], float]:
    return list(result.tokens), result.timings.decode


def ways_of(way: Way) -> dict[str, Callable[[], Awaitable[tuple[list[int], float]]]]:
    return {"plain": way.plain, "plain again": way.plain, "chat": way.chat, "raw": way.raw}


async def measure_ways(setting: Setting, way: Way, count: int) -> dict[str, list[float]]:
    """Seconds a token, a list a way with an entry a round."""
    ways = ways_of(way)
    expected = (await way.raw())[0]
    for run in ways.values():  # warm-up
        await run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(setting.repeats):
        for name in rotated(list(ways), turn):
            tokens, decode = await ways[name]()
            if tokens != expected:
                raise SystemExit(f"{name} gave other tokens than raw mlx_lm: nothing to compare")
            seconds[name].append(decode / (count - 1))
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> Spread:
    """Of the seconds a token to those of plain streams, within each round."""
    return Spread.of(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))


def added(seconds: dict[str, list[float]], name: str) -> Spread:
    return Spread.of(a - b for a, b in zip(seconds[name], seconds["plain"], strict=True))


def table(seconds: dict[str, list[float]]) -> str:
    rows = [
        [
            name,
            Spread.of(each).text(3, 1e3),
            ratio(seconds, name).text(3),
            added(seconds, name).text(0, 1e6),
        ]
        for name, each in seconds.items()
    ]
    return markdown_table(["way", "ms a token", "of plain", "added us a token"], rows)


def draw(record: Record) -> Any:
    made = new_figure(1, 1, 2.2)
    if made is None:
        return None
    figure, (place,) = made
    ways = {
        name: Spread.read(way["ratio_to_plain"])
        for name, way in record["ways"].items()
        if name != "plain"
    }
    draw_dots(place, ways, "time a token, of a plain stream's")
    place.axvline(1.0, color=BLACK, linewidth=1)
    return figure


async def measure(setting: Setting, model: str) -> None:
    count = 200 if setting.quick else 1000
    async with SimpleEngine(model, prompt_cache_bytes=0) as engine:
        rendered = await engine.render_chat(MESSAGES, tools=TOOLS)
        markers = sorted(engine._holder.model().tokenizer.all_special_ids)
        way = Way(engine, list(rendered.tokens), markers, count)
        seconds = await measure_ways(setting, way, count)
    per_token = statistics.median(seconds["raw"]) * 1e3
    about = f"{count} tokens a run, {setting.repeats} rounds; raw mlx-lm takes {per_token:.2f} ms"
    report = Report(setting, f"{about} a token. {INTERVAL}")
    report.add(table(seconds))
    report.finish(
        {
            "tokens": count,
            "rounds": setting.repeats,
            "raw_ms_per_token": per_token,
            "ways": {
                name: {
                    "seconds_per_token": Spread.of(each).record(),
                    "ratio_to_plain": ratio(seconds, name).record(),
                    "added_seconds_per_token": added(seconds, name).record(),
                }
                for name, each in seconds.items()
            },
        },
        draw,
    )


def main() -> None:
    setting = parse_setting("chat_streams", __doc__, repeats=15, layers=3)
    with model_folder(setting) as model:
        asyncio.run(measure(setting, model))


if __name__ == "__main__":
    main()
