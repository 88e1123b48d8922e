"""OpenAI's completions of plain prompts, by OpenAI's own client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from mlx_engine.testing import FakeEngine
from tests.server.asgi import ask

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[FakeEngine]:
    answers = {"Once": " upon a time", "Twice": " as nice"}
    async with FakeEngine(lambda r: answers.get(str(r.prompt), "ids"), max_batch_size=4) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Once", [" upon a time"]),
        ([1, 2], ["ids"]),
        (["Once", "Twice"], [" upon a time", " as nice"]),
        ([[1], [2, 3]], ["ids", "ids"]),
    ],
    ids=["text", "tokens", "texts", "lists"],
)
async def test_every_form_of_a_prompt(
    client: openai.AsyncOpenAI, prompt: Any, texts: list[str]
) -> None:
    whole = await client.completions.create(model="fake", prompt=prompt)
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == list(range(len(texts)))
    stream = await client.completions.create(
        model="fake", prompt=prompt, stream=True, stream_options={"include_usage": True}
    )
    pieces = [piece async for piece in stream]
    counts = pieces.pop().usage
    assert counts is not None
    assert whole.usage is not None
    assert counts.total_tokens == whole.usage.total_tokens
    found = [""] * len(texts)
    for piece in pieces:
        found[piece.choices[0].index] += piece.choices[0].text
    assert found == texts


async def test_several_answers_count_their_prompt_once(client: openai.AsyncOpenAI) -> None:
    one = await client.completions.create(model="fake", prompt="Once")
    two = await client.completions.create(model="fake", prompt="Once", n=2)
    assert one.usage is not None
    assert two.usage is not None
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 2 * one.usage.completion_tokens


async def test_log_probabilities(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="fake", prompt="Once", logprobs=1, max_tokens=2)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, len(choice.logprobs.tokens[0])]
    assert choice.logprobs.token_logprobs == [0, 0]


@pytest.mark.parametrize(
    ("body", "option"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
    ],
)
async def test_bad_requests(app: Any, body: dict[str, Any], option: str) -> None:
    reply = await ask(app, body, PATH)
    assert reply.status == 400
    assert reply.json["error"]["param"] == option
