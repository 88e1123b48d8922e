"""What is done while faults are injected: engines of all kinds, and a few requests to each."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationResult,
    SamplingParams,
    SimpleEngine,
    SpecPrefill,
)
from mlx_engine.constraints import Regex
from mlx_engine.requests import ChatPrompt, GenerationRequest
from tests.engine.pools import Again, begin_with
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO, QWEN_NEXT
from tests.properties.faults import Faults

ALL = os.environ.get("MLX_ENGINE_FAULTS") == "all"
DRAW = random.Random(5)
SHORT = [DRAW.randrange(1, 250) for _ in range(24)]
OTHERS = [[DRAW.randrange(1, 250) for _ in range(length)] for length in (5, 17)]
LONG = [DRAW.randrange(1, 250) for _ in range(100)]
GREEDY: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True}
CHAT = [{"role": "user", "content": "Name a colour."}]

Answers = list[Any]  # of each request its tokens or number, or what it raised
Act = Callable[[BaseEngine, Faults], Awaitable[Answers]]


async def outcome(work: Awaitable[Any]) -> Any:
    """What it gives, or what it raises: caught here, before asyncio sees an exit."""
    try:
        result = await work
    except BaseException as error:
        return error
    return result.tokens if isinstance(result, GenerationResult) else result


async def streamed(engine: BaseEngine, prompt: list[int], **options: Any) -> tuple[int, ...]:
    tokens: list[int] = []
    async with engine.stream_generate(prompt, **options) as stream:
        async for chunk in stream:
            tokens.extend(chunk.tokens)
    assert stream.result.tokens == tuple(tokens)
    return tuple(tokens)


def sampled(faults: Faults) -> dict[str, Any]:
    """Options of all kinds, a logits processor of the caller's among them."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        faults.enter("processor")
        return logits

    return {
        **GREEDY,
        "temperature": 0.9,
        "seed": 3,
        "top_k": 40,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "logprobs": 2,
        "stop": "never to be seen",
        "logits_processors": [processor],
    }


async def one_sampled(engine: BaseEngine, faults: Faults) -> Answers:
    return [await outcome(engine.generate(SHORT, **sampled(faults)))]


async def one_chat(engine: BaseEngine, faults: Faults) -> Answers:
    tools = [{"type": "function", "function": {"name": "f"}}]
    return [await outcome(engine.chat(CHAT, tools=tools, **GREEDY))]


async def two_that_reason(engine: BaseEngine, faults: Faults) -> Answers:
    """One whose reasoning is closed early, and one whose is not, beside each other."""

    def chat(budget: int | None) -> Awaitable[GenerationResult]:
        variables = {"enable_thinking": "open"}
        source = ChatPrompt.of(CHAT, None, variables, max_reasoning_tokens=budget)
        return engine.submit(GenerationRequest(source, SamplingParams(**GREEDY))).run(None)

    return await asyncio.gather(outcome(chat(3)), outcome(chat(None)))


async def three_with_questions(engine: BaseEngine, faults: Faults) -> Answers:
    """Questions about prompts, which are asked beside requests, have nothing to do with them."""
    requests = asyncio.ensure_future(three_at_once(engine, faults))
    for _ in range(4):
        count, chat = await asyncio.gather(engine.count_tokens(SHORT), engine.render_chat(CHAT))
        assert count == len(SHORT)
        assert chat.text.count("Name a colour.") == 1
    return await requests


async def two_beside_a_bound_one(engine: BaseEngine, faults: Faults) -> Answers:
    """Answers that are bound, with what is forced in them, beside one that is free."""
    bound: dict[str, Any] = {"constraint": Regex('[{]"a long key": [0-9]{3}}'), "max_tokens": 22}
    return await asyncio.gather(
        outcome(engine.generate(SHORT, **bound)),
        outcome(streamed(engine, OTHERS[0], temperature=1.0, seed=2, **bound)),
        outcome(engine.generate(OTHERS[1], **GREEDY)),
    )


async def one_stream_then_more(engine: BaseEngine, faults: Faults) -> Answers:
    first = await outcome(streamed(engine, SHORT, **GREEDY))
    again = await outcome(engine.generate([*SHORT, 7, 8, 9, *SHORT], **GREEDY))
    return [first, again]


async def three_at_once(engine: BaseEngine, faults: Faults) -> Answers:
    return await asyncio.gather(
        outcome(engine.generate(SHORT, **sampled(faults))),
        outcome(streamed(engine, OTHERS[0], max_tokens=12, ignore_eos=True)),
        outcome(engine.generate(OTHERS[1], max_tokens=5, ignore_eos=True)),
    )


async def one_joins_two(engine: BaseEngine, faults: Faults) -> Answers:
    """A long prompt comes while two are decoding."""

    async def join() -> Any:
        await begun.wait()
        return await outcome(engine.generate(LONG, **GREEDY))

    async def first() -> tuple[int, ...]:
        tokens: list[int] = []
        try:
            async with engine.stream_generate(OTHERS[0], max_tokens=16, ignore_eos=True) as stream:
                async for chunk in stream:
                    tokens.extend(chunk.tokens)
                    begun.set()
        finally:
            begun.set()
        return tuple(tokens)

    begun = asyncio.Event()
    return await asyncio.gather(
        outcome(first()),
        outcome(engine.generate(OTHERS[1], max_tokens=16, ignore_eos=True)),
        join(),
    )


async def one_long(engine: BaseEngine, faults: Faults) -> Answers:
    return [await outcome(engine.generate(LONG, **GREEDY))]


async def three_that_begin_alike(engine: BaseEngine, faults: Faults) -> Answers:
    """One goes ahead and the others wait for what they share; all of them by one call."""
    prompts = [[*LONG, 200 + number, *OTHERS[number % 2]] for number in range(3)]
    outcomes = engine.map(prompts, concurrency=3, ordered=True, **GREEDY)
    return [each.error or each.unwrap().tokens async for each in outcomes]


async def one_makes_way(engine: BaseEngine, faults: Faults) -> Answers:
    """One that decodes with its drafter is joined by another."""

    async def second() -> Any:
        await begun.wait()
        return await outcome(engine.generate(OTHERS[1], max_tokens=6, ignore_eos=True))

    async def first() -> tuple[int, ...]:
        tokens: list[int] = []
        try:
            async with engine.stream_generate(SHORT, max_tokens=16, ignore_eos=True) as stream:
                async for chunk in stream:
                    tokens.extend(chunk.tokens)
                    if len(tokens) > 4:
                        begun.set()
        finally:
            begun.set()
        return tuple(tokens)

    begun = asyncio.Event()
    return await asyncio.gather(outcome(first()), second())


@dataclass(frozen=True)
class Case:
    """An engine, and what is asked of it."""

    engine: Callable[[Path, Path], BaseEngine]
    act: Act
    model: str = "tiny"


def simple(**options: Any) -> Callable[[Path, Path], BaseEngine]:
    return lambda model, draft: SimpleEngine(
        model, prefill_step_size=16, **{k: _of(v, draft) for k, v in options.items()}
    )


def batched(**options: Any) -> Callable[[Path, Path], BaseEngine]:
    return lambda model, draft: BatchedEngine(
        model, prefill_step_size=64, **{k: _of(v, draft) for k, v in options.items()}
    )


def preempting(period: int, **options: Any) -> Callable[[Path, Path], BaseEngine]:
    """A batched engine that has no memory for a moment, again and again."""

    def make(model: Path, draft: Path) -> BaseEngine:
        engine = batched(**options)(model, draft)
        assert isinstance(engine, BatchedEngine)
        return begin_with(engine, lambda: Again(period))

    return make


def _of(option: Any, draft: Path) -> Any:
    return option(draft) if callable(option) else option


def _draft(folder: Path) -> DraftModel:
    return DraftModel(folder, 2)


def _sparse(folder: Path) -> SpecPrefill:
    return SpecPrefill(folder, keep=0.3, threshold=64)


CASES: dict[str, Case] = {
    "simple, sampled": Case(simple(), one_sampled),
    "simple, chat": Case(simple(), one_chat),
    "simple, draft, reasoning": Case(simple(decode=_draft), two_that_reason),
    "batched, reasoning": Case(batched(), two_that_reason),
    "simple, prompt cache": Case(simple(), one_stream_then_more),
    "batched, three": Case(batched(), three_at_once),
    "simple, draft, constrained": Case(simple(decode=_draft), two_beside_a_bound_one),
    "batched, constrained": Case(batched(), two_beside_a_bound_one),
    "batched, questions": Case(batched(), three_with_questions),
    "batched, joined": Case(batched(), one_joins_two),
    "batched, alike": Case(batched(), three_that_begin_alike),
    "batched, chat": Case(batched(), one_chat),
    "simple, draft": Case(simple(decode=_draft), one_sampled),
    "batched, draft": Case(batched(decode=_draft), one_makes_way),
    "simple, MTP": Case(simple(decode=MTP(2)), one_sampled, "MIMO"),
    "simple, recurrent MTP": Case(simple(decode=MTP(2)), one_long, "QWEN_NEXT"),
    "batched, MTP": Case(batched(decode=MTP(2)), one_makes_way, "MIMO"),
    "simple, SpecPrefill": Case(simple(prefill=_sparse), one_long),
    "batched, SpecPrefill": Case(batched(prefill=_sparse), one_joins_two),
    "batched, both": Case(batched(prefill=_sparse, decode=_draft), one_joins_two),
    "batched, preempted": Case(preempting(6), three_at_once),
    "batched, constrained, preempted": Case(preempting(7), two_beside_a_bound_one),
    "batched, draft, preempted": Case(preempting(5, decode=_draft), one_makes_way),
    "batched, SpecPrefill, preempted": Case(preempting(6, prefill=_sparse), one_joins_two),
    "batched, recurrent MTP, preempted": Case(
        preempting(5, decode=MTP(2)), one_makes_way, "QWEN_NEXT"
    ),
}
LEAST = 20  # faults in each of them; all together they are above 380


async def folder_of(name: str, models: dict[str, Path], tiny_path: Path) -> Path:
    if name == "tiny":
        return tiny_path
    if name not in models:
        kind = {"MIMO": MIMO, "QWEN_NEXT": QWEN_NEXT}[name]
        models[name] = await made(kind, models[""] / name, 3)
    return models[name]


def ordinary() -> Iterator[Callable[[], BaseException]]:
    """What code raises that fails."""
    return itertools.cycle(
        [
            lambda: RuntimeError("[METAL] Command buffer execution failed"),
            lambda: MemoryError("no room"),
            lambda: RuntimeError("injected"),
            lambda: StopIteration("over"),
        ]
    )
