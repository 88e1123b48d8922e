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

Then: the time to compile a schema, the first time and when it is known.
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
ROWS = (1, 8, 32)
FORCED = decoder._FORCED  # tokens that are proposed at most
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
Run = Callable[[], Awaitable[float]]  # gives tokens a second


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
    forced: int = FORCED,
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


def tables(every: dict[str, Measured]) -> list[str]:
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
    for table in tables(every):
        report.add(table)
    models = record_of(every)
    about = {"tokens": count, "rounds": setting.repeats}
    report.finish({**about, "models": models}, draw)


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
