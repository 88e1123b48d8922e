"""What does a constraint cost, and what does it save?

Random models with vocabularies of three sizes and of about 1 and 10 ms a step; every answer is cut
after the same number of tokens, so that ways that choose other tokens do the same work.

    free         requests without a constraint
    free again   the same once more: how far its ratio is from 1 is the noise of this machine
    constrained  the same requests, each answer JSON by a schema with strings and numbers
    masks alone  the same, token by token: nothing that its grammar forces is proposed
    by hand      for one request at a time: ``mlx_lm.stream_generate`` with a logits processor that
                 asks llguidance's matcher for a mask and applies it, as its own examples do; to be
                 compared with ``raw``, which is ``mlx_lm.stream_generate`` without it

A round runs each way once, and the order rotates from round to round; ratios are taken within a
round, of tokens a second from the first token to the last.

Then: the time to compile a schema, the first time and when it is known; and a call of a tool with
long keys, with what its grammar forces put in at once, and token by token, whose answers are the
same. That is for models which write a text as their tokenizer does: one whose tokens are bytes, and
the demo model; a random one with other tokens likes any that the masks allow.
"""

from __future__ import annotations

import asyncio
import copy
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask

from benchmarks.drawing import BLACK, draw_dots, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, parse_setting, rotated
from benchmarks.spread import Record, Spread
from benchmarks.vocabularies import model_of
from mlx_engine import BatchedEngine, JSONSchema, SimpleEngine
from mlx_engine.engine.base import BaseEngine
from mlx_engine.generation.speculative import decoder

PROMPT = [70, 71, 72, 73, 74, 75, 76, 77]
MODELS = ((512, 1), (49152, 1), (151936, 1), (49152, 16))  # tokens in the vocabulary, and layers
BYTES = 262  # tokens where each is a byte, with those that are special
ROWS = (1, 8, 32)
ITEMS = JSONSchema(
    {
        "type": "array",
        "minItems": 4_000,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 8, "maxLength": 40},
                "count": {"type": "integer"},
                "kind": {"enum": ["first", "second", "third"]},
            },
            "required": ["name", "count", "kind"],
            "additionalProperties": False,
        },
    }
)
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

Run = Callable[[], Awaitable[float]]  # gives tokens a second
Calls = dict[str, tuple[dict[str, list[float]], int]]  # seconds by the way, and tokens


@dataclass
class Measured:
    """Of one model.

    Attributes:
        step: milliseconds that a token of one request takes, without a constraint.
        rates: tokens a second by the engine and its rows, and by the way; an entry a round.
        compile: seconds that the first token is late for a schema that is new, and for a known one.
    """

    step: float = 0.0
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    compile: dict[str, list[float]] = field(default_factory=dict)


async def rate(
    engine: BaseEngine,
    rows: int,
    count: int,
    constraint: JSONSchema | None,
    forced: int = decoder._FORCED,
) -> float:
    """Tokens a second of so many requests at once; ``forced`` tokens are proposed at most."""
    decoder._FORCED = forced
    options: dict[str, Any] = {"max_tokens": count}
    options |= {"ignore_eos": True} if constraint is None else {"constraint": constraint}
    results = await asyncio.gather(
        *(engine.generate([*PROMPT, row + 64], **options) for row in range(rows))
    )
    for result in results:
        if len(result.tokens) != count:
            raise SystemExit(f"an answer has {len(result.tokens)} tokens: nothing to compare")
    return sum((count - 1) / result.timings.decode for result in results)


async def by_hand(engine: BaseEngine, count: int, *, constrained: bool) -> float:
    """On the MLX thread, and with the very model that the engine uses."""
    return await engine.run_blocking(_by_hand, engine, count, constrained)


def _by_hand(engine: BaseEngine, count: int, constrained: bool) -> float:
    loaded = engine._holder.model()  # type: ignore[attr-defined]
    tokenizer = copy.copy(loaded.tokenizer)
    tokenizer.eos_token_ids = []
    processors = [HandMade(loaded)] if constrained else []
    first = 0.0
    for _ in mlx_lm.stream_generate(
        loaded.model,
        tokenizer,
        mx.array([*PROMPT, 64]),
        max_tokens=count,
        logits_processors=processors,
    ):
        first = first or time.perf_counter()
    return (count - 1) / (time.perf_counter() - first)


_TRIES: dict[int, LLTokenizer] = {}  # of the tokenizers, by the sizes of their vocabularies


class HandMade:
    """A logits processor around a matcher."""

    def __init__(self, loaded: Any) -> None:
        size = loaded.vocabulary.vocab_size
        if size not in _TRIES:
            _TRIES[size] = from_tokenizer(loaded.tokenizer._tokenizer, size)
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(ITEMS.schema))
        self._matcher = LLMatcher(_TRIES[size], grammar)
        self._words = np.zeros((1, (size + 31) // 32), dtype=np.int32)
        self._begun = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._begun and not self._matcher.consume_token(tokens[-1].item()):
            raise SystemExit("the matcher refuses a token")
        self._begun = True
        fill_next_token_bitmask(self._matcher, self._words)
        bits = np.unpackbits(self._words.view(np.uint8), axis=1, bitorder="little")
        allowed = mx.array(bits[:, : logits.shape[-1]]) == 1
        return mx.where(allowed, logits, -mx.inf)


async def measure_ways(ways: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """An entry a round, after a run of each to warm up."""
    for run in ways.values():
        await run()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in rotated(list(ways), turn):
            found[name].append(await ways[name]())
    return found


def ways_of(engine: BaseEngine, rows: int, count: int) -> dict[str, Run]:
    return {
        "free": lambda: rate(engine, rows, count, None),
        "free again": lambda: rate(engine, rows, count, None),
        "constrained": lambda: rate(engine, rows, count, ITEMS),
        "masks alone": lambda: rate(engine, rows, count, ITEMS, 0),
    }


async def time_compiling(engine: BaseEngine, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token, less those of a request without a constraint."""

    async def first(constraint: JSONSchema | None) -> float:
        result = await engine.generate(PROMPT, max_tokens=1, constraint=constraint)
        return result.timings.time_to_first_token

    found: dict[str, list[float]] = {"new": [], "known": []}
    for turn in range(repeats):
        new = JSONSchema({**ITEMS.schema, "minItems": 3000 + turn})  # type: ignore[dict-item]
        free = statistics.median([await first(None) for _ in range(3)])
        found["new"].append(await first(new) - free)
        found["known"].append(await first(new) - free)
    return found


async def time_forced(model: str, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of a call by the way, an entry a round; and its tokens."""
    tokens: list[int] = []

    async def call(forced: int = decoder._FORCED) -> float:
        decoder._FORCED = forced
        result = await engine.generate(PROMPT, max_tokens=400, constraint=CALL)
        if result.finish_reason != "stop":
            raise SystemExit("a call was not completed: nothing to compare")
        if tokens and tokens != [*result.tokens]:
            raise SystemExit("what is forced has changed the answer: nothing to compare")
        tokens[:] = result.tokens
        return result.timings.total

    ways: dict[str, Run] = {
        "at once": call,
        "token by token": lambda: call(0),
    }
    async with SimpleEngine(model, prompt_cache_bytes=0) as engine:
        return await measure_ways(ways, repeats), len(tokens)


async def measure_model(folder: str, setting: Setting, count: int) -> Measured:
    measured = Measured()
    async with SimpleEngine(folder, prompt_cache_bytes=0) as simple:
        ways = ways_of(simple, 1, count)
        ways["raw"] = lambda: by_hand(simple, count, constrained=False)
        ways["by hand"] = lambda: by_hand(simple, count, constrained=True)
        found = measured.rates["SimpleEngine"] = await measure_ways(ways, setting.repeats)
        measured.step = 1e3 / statistics.median(found["free"])
        measured.compile = await time_compiling(simple, setting.repeats)
    async with BatchedEngine(folder, max_batch_size=max(ROWS), prompt_cache_bytes=0) as batched:
        for rows in ROWS:
            fewer = max(20, count // (2 if rows > 1 else 1))
            ways = ways_of(batched, rows, fewer)
            measured.rates[f"BatchedEngine, {rows}"] = await measure_ways(ways, setting.repeats)
    return measured


def ratio(found: dict[str, list[float]], name: str, of: str) -> Spread:
    """Within each round."""
    return Spread.of(a / b for a, b in zip(found[name], found[of], strict=True))


def tables(every: dict[str, Measured], calls: Calls) -> list[str]:
    rates, others = [], []
    for model, measured in every.items():
        for where, found in measured.rates.items():
            hand = ratio(found, "by hand", "raw").text(3) if "by hand" in found else ""
            rates.append(
                [
                    f"{model}; {where}",
                    Spread.of(found["free"]).text(0),
                    ratio(found, "free again", "free").text(3),
                    ratio(found, "constrained", "free").text(3),
                    ratio(found, "masks alone", "free").text(3),
                    hand,
                ]
            )
        others.append(
            [
                model,
                Spread.of(measured.compile["new"]).text(1, 1e3),
                Spread.of(measured.compile["known"]).text(1, 1e3),
            ]
        )
    head = [
        "model; engine, rows",
        "free, tokens/s",
        "free again",
        "constrained, of free",
        "masks alone",
    ]
    return [
        markdown_table([*head, "by hand, of raw"], rates),
        markdown_table(["model", "new schema, ms", "known, ms"], others),
        markdown_table(
            ["a call by", "tokens", "ms", "token by token, ms", "of that"],
            [
                [
                    name,
                    str(tokens),
                    Spread.of(found["at once"]).text(0, 1e3),
                    Spread.of(found["token by token"]).text(0, 1e3),
                    ratio(found, "at once", "token by token").text(2),
                ]
                for name, (found, tokens) in calls.items()
            ],
        ),
    ]


def record_of(every: dict[str, Measured]) -> Record:
    return {
        model: {
            "step_ms": measured.step,
            "tokens_per_second": {
                where: {name: Spread.of(each).record() for name, each in found.items()}
                for where, found in measured.rates.items()
            },
            "compile_seconds": {n: Spread.of(v).record() for n, v in measured.compile.items()},
        }
        for model, measured in every.items()
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 1, 4.2)
    if made is None:
        return None
    figure, (place,) = made
    shown: dict[str, Spread] = {}
    for model, of_model in record["models"].items():
        for where, found in of_model["tokens_per_second"].items():
            pairs = zip(found["constrained"]["values"], found["free"]["values"], strict=True)
            shown[f"{model}; {where}"] = Spread.of(a / b for a, b in pairs)
    draw_dots(place, shown, "tokens/s with a constraint, of those without")
    place.axvline(1.0, color=BLACK, linewidth=1)
    return figure


async def measure(setting: Setting) -> None:
    count = 40 if setting.quick else 200
    report = Report(setting, f"{count} tokens an answer, {setting.repeats} rounds. {INTERVAL}")
    every: dict[str, Measured] = {}
    for size, layers in MODELS[1:2] if setting.own.one else MODELS:
        with model_of(size, layers) as folder:
            measured = await measure_model(folder, setting, count)
        every[f"{size:,} tokens, {measured.step:.1f} ms"] = measured
    calls: Calls = {"the demo model": await time_forced("demo", setting.repeats)}
    with model_of(BYTES, 8) as folder:
        calls["a model of bytes"] = await time_forced(folder, setting.repeats)
    for table in tables(every, calls):
        report.add(table)
    called = {
        name: {way: Spread.of(each).record() for way, each in found.items()} | {"tokens": tokens}
        for name, (found, tokens) in calls.items()
    }
    models = record_of(every)
    about = {"tokens": count, "rounds": setting.repeats}
    report.finish({**about, "models": models, "call_seconds": called}, draw)


def main() -> None:
    setting = parse_setting(
        "constrained",
        __doc__,
        repeats=7,
        quick_repeats=2,
        layers=None,
        add_own=lambda parser: parser.add_argument(
            "--one", action="store_true", help="the model of 49,152 tokens and one layer alone"
        ),
    )
    asyncio.run(measure(setting))


if __name__ == "__main__":
    main()
