"""How much sooner does the first token come when the prompt's beginning is known already?

Each measurement is made with the prompt cache and without it (``prompt_cache_bytes=0``), for
``SimpleEngine`` and for ``BatchedEngine``, one request at a time, greedy. Both engines of a pair
get the same requests, one after the other. The tokens of both are compared: a run in which they
differ fails. Nothing else runs; the contents are new in each round, so that each round begins
with nothing of it in the cache.

**Conversation.** Eight turns of about 500 tokens: a user's turn of 436 and an answer of 64. As
*prompts*: token ids, the answer's own among them. As *chat*: ``engine.chat`` with messages, where
the answer goes back as text and is tokenized anew (with the random model a ``logit_bias`` keeps
answers to printable ASCII, since other bytes would not survive that). The table shows the time
to first token of each turn, with and without, their ratio within the round, and how much of
the last prompt came from the cache (``usage.cached_tokens``).

**Prefix.** A prompt of 4,000 tokens and 16 more: for the first time (cold), word for word once
more (again), then with 16 other tokens at its end (other end). "Times shorter" is cold over the
other, on the engine with the cache. Cold without the cache is in the table to see what keeping
costs: the time to first token, and the time until all of the answer is there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.drawing import BLACK, draw_dots, draw_line, log_scale, new_figure
from benchmarks.report import INTERVAL, Report, markdown_table
from benchmarks.setting import Setting, model_folder, parse_setting
from benchmarks.spread import Record, Spread
from mlx_engine import BaseEngine, BatchedEngine, GenerationResult, SimpleEngine

USER_TURN = 436
ANSWER = 64
PREFIX = 4000
SUFFIX = 16
KINDS: dict[str, type[SimpleEngine] | type[BatchedEngine]] = {
    "SimpleEngine": SimpleEngine,
    "BatchedEngine": BatchedEngine,
}
IDS = range(64, 154)  # that every vocabulary has
PRINTABLE = range(94)  # ids of the random models' tokenizer that are printable ASCII


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: seconds to the first token and to the last, and tokens from the cache."""

    first_token: float
    total: float
    prompt: int
    cached: int
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, result: GenerationResult) -> Reply:
        return cls(
            result.timings.time_to_first_token,
            result.timings.total,
            result.usage.prompt_tokens,
            result.usage.cached_tokens,
            result.tokens,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """The same request with the cache and without."""

    cached: Reply
    plain: Reply

    def check(self, what: str) -> Pair:
        if self.cached.tokens != self.plain.tokens:
            raise SystemExit(f"{what}: other tokens with the prompt cache than without")
        if self.plain.cached:
            raise SystemExit(f"{what}: tokens came from a cache that is switched off")
        return self


@dataclass(slots=True)
class Measured:
    """Of one kind of engine; a list a round."""

    conversations: dict[str, list[list[Pair]]] = field(default_factory=dict)  # by turn
    prefix: dict[str, list[Pair]] = field(default_factory=dict)

    def shorter(self, what: str) -> Spread:
        """Cold over this one, both with the cache, within each round."""
        pairs = zip(self.prefix["cold"], self.prefix[what], strict=True)
        return Spread.of(cold.cached.first_token / pair.cached.first_token for cold, pair in pairs)


@dataclass(frozen=True, slots=True)
class Engines:
    """Two of a kind, with the same model."""

    cached: BaseEngine
    plain: BaseEngine

    @classmethod
    @asynccontextmanager
    async def running(
        cls, kind: type[SimpleEngine] | type[BatchedEngine], model: str
    ) -> AsyncIterator[Engines]:
        async with AsyncExitStack() as stack:
            yield cls(
                await stack.enter_async_context(kind(model, prompt_cache_bytes=None)),
                await stack.enter_async_context(kind(model, prompt_cache_bytes=0)),
            )


async def ask(engine: BaseEngine, prompt: list[int], max_tokens: int = ANSWER) -> Reply:
    return Reply.of(await engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True))


def words(chooser: random.Random, count: int) -> list[int]:
    return [chooser.choice(IDS) for _ in range(count)]


async def converse(engines: Engines, chooser: random.Random, turns: int) -> list[Pair]:
    """By token ids: each prompt is the one before, its answer, and the user's next turn."""
    prompt: list[int] = []
    pairs = []
    for turn in range(turns):
        prompt += words(chooser, USER_TURN)
        pair = Pair(await ask(engines.cached, prompt), await ask(engines.plain, prompt))
        pairs.append(pair.check(f"prompts, turn {turn + 1}"))
        if turn == 0 and pair.cached.cached:
            raise SystemExit("prompts: a conversation that is new came from the cache")
        prompt += pair.cached.tokens
    return pairs


async def chat(
    engines: Engines, chooser: random.Random, turns: int, bias: dict[int, float]
) -> list[Pair]:
    """By messages: the answers go back as text."""
    messages: list[dict[str, str]] = []
    pairs = []
    for turn in range(turns):
        letters = (chr(chooser.randrange(97, 123)) for _ in range(USER_TURN))
        messages.append({"role": "user", "content": "".join(letters)})
        results = [
            await engine.chat(messages, max_tokens=ANSWER, ignore_eos=True, logit_bias=bias)
            for engine in (engines.cached, engines.plain)
        ]
        pairs.append(Pair(*map(Reply.of, results)).check(f"chat, turn {turn + 1}"))
        messages.append({"role": "assistant", "content": results[0].text})
    return pairs


async def measure_prefix(engines: Engines, chooser: random.Random, length: int) -> dict[str, Pair]:
    prefix = words(chooser, length)
    first, other = words(chooser, SUFFIX), words(chooser, SUFFIX)
    pairs = {}
    for name, suffix in (("cold", first), ("again", first), ("other end", other)):
        prompt = prefix + suffix
        pair = Pair(await ask(engines.cached, prompt), await ask(engines.plain, prompt))
        pairs[name] = pair.check(f"prefix, {name}")
    if pairs["cold"].cached.cached:
        raise SystemExit("prefix: a prompt that is new came from the cache")
    return pairs


async def measure_kind(
    kind: type[SimpleEngine] | type[BatchedEngine], model: str, setting: Setting
) -> Measured:
    turns, length = (4, 1000) if setting.quick else (8, PREFIX)
    # With a user's model the text survives by itself.
    bias = {} if setting.model is not None else dict.fromkeys(PRINTABLE, 100.0)
    measured = Measured()
    async with Engines.running(kind, model) as engines:
        talks: dict[str, Any] = {"prompts": converse}
        if engines.cached.has_chat_template:
            talks["chat"] = lambda *given: chat(*given, bias)
        for talk in talks.values():  # warm-up
            await talk(engines, random.Random("warm-up"), 2)
        for turn in range(setting.repeats):
            chooser = random.Random(turn)
            for name, talk in talks.items():
                pairs = await talk(engines, chooser, turns)
                measured.conversations.setdefault(name, []).append(pairs)
            for name, pair in (await measure_prefix(engines, chooser, length)).items():
                measured.prefix.setdefault(name, []).append(pair)
    return measured


def conversation_table(kinds: dict[str, Measured]) -> str:
    rows = []
    for kind, measured in kinds.items():
        for name, rounds in measured.conversations.items():
            for turn, pairs in enumerate(zip(*rounds, strict=True), 1):
                ratio = Spread.of(p.plain.first_token / p.cached.first_token for p in pairs)
                rows.append(
                    [
                        f"{kind}, {name}, turn {turn}",
                        str(pairs[0].cached.prompt),
                        Spread.of(pair.cached.cached for pair in pairs).text(0),
                        Spread.of(pair.cached.first_token for pair in pairs).text(1, 1e3),
                        Spread.of(pair.plain.first_token for pair in pairs).text(1, 1e3),
                        ratio.text(1),
                    ]
                )
    head = ["conversation", "prompt tokens", "from the cache", "first token ms", "without cache ms"]
    return markdown_table([*head, "times shorter"], rows)


def prefix_table(kinds: dict[str, Measured]) -> str:
    rows = []
    for kind, measured in kinds.items():
        for name, pairs in measured.prefix.items():
            rows.append(
                [
                    f"{kind}, {name}",
                    Spread.of(pair.cached.cached for pair in pairs).text(0),
                    Spread.of(pair.cached.first_token for pair in pairs).text(1, 1e3),
                    measured.shorter(name).text(1),
                    Spread.of(pair.plain.first_token for pair in pairs).text(1, 1e3),
                    Spread.of(pair.cached.total for pair in pairs).text(1, 1e3),
                    Spread.of(pair.plain.total for pair in pairs).text(1, 1e3),
                ]
            )
    head = ["prefix", "from the cache", "first token ms", "times shorter than cold"]
    head += ["first token without cache ms", "all of the answer ms", "all without cache ms"]
    return markdown_table(head, rows)


def pairs_record(pairs: tuple[Pair, ...] | list[Pair]) -> Record:
    shorter = Spread.of(pair.plain.first_token / pair.cached.first_token for pair in pairs)
    return {
        "prompt_tokens": pairs[0].cached.prompt,
        "cached_tokens": [pair.cached.cached for pair in pairs],
        "first_token_seconds": Spread.of(pair.cached.first_token for pair in pairs).record(),
        "first_token_seconds_without": Spread.of(p.plain.first_token for p in pairs).record(),
        "times_shorter_than_without": shorter.record(),
        "total_seconds": Spread.of(pair.cached.total for pair in pairs).record(),
        "total_seconds_without": Spread.of(pair.plain.total for pair in pairs).record(),
    }


def record_of(measured: Measured) -> Record:
    return {
        "conversations": {
            name: [pairs_record(pairs) for pairs in zip(*rounds, strict=True)]
            for name, rounds in measured.conversations.items()
        },
        "prefix": {
            name: {
                **pairs_record(pairs),
                "times_shorter_than_cold": measured.shorter(name).record(),
            }
            for name, pairs in measured.prefix.items()
        },
    }


def draw(record: Record) -> Any:
    made = new_figure(1, 2, 3.4)
    if made is None:
        return None
    figure, (left, right) = made
    shorter: dict[str, Spread] = {}
    for kind, of_kind in record["engines"].items():
        if kind == "SimpleEngine":
            draw_conversation(left, of_kind["conversations"]["prompts"])
        for name, of_prefix in of_kind["prefix"].items():
            if name != "cold":
                spread = Spread.read(of_prefix["times_shorter_than_cold"])
                shorter[f"{kind},\n{name}"] = spread
    left.set_title("SimpleEngine, a conversation")
    draw_dots(right, shorter, "first token: times sooner than cold")
    right.set_title("A long beginning that is known")
    right.axvline(1, color=BLACK, linewidth=1)
    log_scale(right, "x")
    return figure


def draw_conversation(axis: Any, turns: list[Record]) -> None:
    lines = (
        ("first_token_seconds_without", "without the prompt cache", "--"),
        ("first_token_seconds", "with it", "-"),
    )
    for series, (what, label, style) in enumerate(lines):
        spreads = [Spread.read(turn[what]) for turn in turns]
        tokens = [turn["prompt_tokens"] for turn in turns]
        draw_line(axis, tokens, spreads, label, series=series, style=style, scale=1e3)
    axis.set_xlabel("prompt tokens, one mark a turn")
    axis.set_ylabel("time to first token, ms")
    axis.set_ylim(bottom=0)
    axis.legend()


def main() -> None:
    setting = parse_setting("prompt_cache", __doc__, repeats=7, quick_repeats=2)
    report = Report(setting, f"{setting.repeats} rounds. {INTERVAL}")
    with model_folder(setting) as model:
        kinds = {
            name: asyncio.run(measure_kind(kind, model, setting)) for name, kind in KINDS.items()
        }
    report.add(prefix_table(kinds))
    report.add(conversation_table(kinds))
    engines = {name: record_of(measured) for name, measured in kinds.items()}
    report.finish({"rounds": setting.repeats, "engines": engines}, draw)


if __name__ == "__main__":
    main()
