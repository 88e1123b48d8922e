"""Constraints on answers of chats: behind reasoning, in calls, and within a budget."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from mlx_engine import BaseEngine, DraftModel, GenerationResult, InvalidRequest
from mlx_engine.constraints import Choice, Grammar, JSONSchema, Regex
from tests.constraints.schemas import DIGIT, EDIT, record

pytestmark = pytest.mark.anyio

OPEN: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": "open"}}
MESSAGES = [{"role": "user", "content": "hi"}]
BIAS = {"</think>": 6.0, '"': 5.0, "}": 4.0, "<": 2.0, "Ġ": -4.0, "Ċ": -4.0, "ĉ": -4.0, "č": -4.0}
BILL = record({"amount in euros": DIGIT, "paid": {"type": "boolean"}})
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("edit", EDIT), ("bill", BILL))
]


@pytest.fixture(params=[None, "draft"])
async def any_engine(
    request: pytest.FixtureRequest, tiny_path: Path, engine_type: type[BaseEngine]
) -> AsyncIterator[BaseEngine]:
    options = {} if request.param is None else {"decode": DraftModel(tiny_path, 2)}
    async with engine_type(tiny_path, **options) as engine:
        yield engine


def drawn(engine: BaseEngine, seed: int) -> dict[str, Any]:
    """Options of answers that are as random as they can be, and come to an end."""
    tokenizer = engine._holder.model().tokenizer  # type: ignore[attr-defined]
    bias = {tokenizer.convert_tokens_to_ids(text): more for text, more in BIAS.items()}
    return {"temperature": 1.0, "seed": seed, "logit_bias": bias, "max_tokens": 120}


async def test_a_constraint_begins_behind_the_reasoning(any_engine: BaseEngine) -> None:
    constraint = JSONSchema(EDIT)
    works = [
        any_engine.chat(MESSAGES, constraint=constraint, **OPEN, **drawn(any_engine, seed))
        for seed in range(5)
    ]
    results = await asyncio.gather(*works)
    finished = [each for each in results if each.finish_reason == "stop"]
    assert len(finished) > 1
    assert any(each.reasoning for each in finished)
    for each in finished:
        jsonschema.validate(json.loads(each.text), EDIT)


async def test_reasoning_that_is_closed_is_followed_by_what_is_bound(
    any_engine: BaseEngine,
) -> None:
    for constraint, text in ((Choice(["yes"]), "yes"), (Regex("[ab]{3}"), None)):
        for budget in (0, 1, 2, 7):
            result = await any_engine.chat(
                MESSAGES, constraint=constraint, max_reasoning_tokens=budget, **OPEN
            )
            assert result.finish_reason == "stop"
            assert text is None or result.text.strip() == text
            again = await any_engine.chat(
                MESSAGES, constraint=constraint, max_reasoning_tokens=budget, decode=None, **OPEN
            )
            assert again.tokens == result.tokens


async def test_a_character_that_has_begun_is_completed_before_reasoning_is_closed(
    any_engine: BaseEngine,
) -> None:
    text = "a日本é"
    script = any_engine._holder.model().tokenizer.encode(text)  # type: ignore[attr-defined]

    def wished(tokens: mx.array, logits: mx.array) -> mx.array:
        at = tokens.size - prompt
        wish = script[at] if at < len(script) else 0
        return logits + 50.0 * (mx.arange(logits.shape[-1]) == wish)

    prompt = len((await any_engine.render_chat(MESSAGES, **OPEN)).tokens)
    for budget in range(2, len(script)):
        result = await any_engine.chat(
            MESSAGES,
            constraint=Choice(["yes"]),
            max_reasoning_tokens=budget,
            logits_processors=[wished],
            **OPEN,
        )
        assert result.text.strip() == "yes"
        assert result.reasoning.strip()
        assert text.startswith(result.reasoning.strip())


async def test_a_call_that_must_come_names_a_tool_and_validates(any_engine: BaseEngine) -> None:
    async def ask(seed: int, choice: Any) -> GenerationResult:
        options = drawn(any_engine, seed)
        return await any_engine.chat(
            MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **options
        )

    schemas = {"edit": EDIT, "bill": BILL}
    named = {"type": "function", "function": {"name": "bill"}}
    works = [ask(n, named if n % 2 else "required") for n in range(6)]
    results = await asyncio.gather(*works)
    finished = [each for each in results if each.finish_reason == "tool_calls"]
    assert len(finished) > 2
    assert all(each.finish_reason in ("tool_calls", "length") for each in results)
    for each in finished:
        (call,) = each.tool_calls
        jsonschema.validate(call.arguments, schemas[call.name])
    named_ones = [each for n, each in enumerate(results) if n % 2]
    assert all(call.name == "bill" for each in named_ones for call in each.tool_calls)


async def test_what_cannot_be_compiled_costs_its_own_request_only(any_engine: BaseEngine) -> None:
    bad = any_engine.chat(MESSAGES, constraint=Grammar("start: nobody"))
    plain = any_engine.generate([1, 2], constraint=Grammar("start: nobody"))
    good = any_engine.chat(MESSAGES, constraint=Choice(["yes"]))
    errors = await asyncio.gather(bad, plain, good, return_exceptions=True)
    for error in errors[:2]:
        assert isinstance(error, InvalidRequest)
        assert error.option == "constraint"
    assert isinstance(errors[2], GenerationResult)
    assert errors[2].text == "yes"
