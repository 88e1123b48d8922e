"""A real model behind the server: the same words, and MLX free when a client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BatchedEngine
from mlx_engine.server import create_app
from tests.conftest import other_tasks, settled
from tests.guard import Gate
from tests.server.asgi import CHAT, Client, ask
from tests.waiting import until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
async def engine(tiny_path: Path) -> AsyncIterator[BatchedEngine]:
    async with BatchedEngine(tiny_path, prefill_step_size=8, context_length=2_000) as engine:
        yield engine


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_it_says_what_the_engine_says(engine: BatchedEngine, stream: bool) -> None:
    app = create_app(engine)
    options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "logprobs": True}
    reply = await ask(app, {"messages": HELLO, "stream": stream, **options})
    result = await engine.chat(HELLO, max_tokens=20, ignore_eos=True, logprobs=0)
    if stream:
        choices = [event["choices"][0] for event in reply.events[:-1]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == result.text
        tokens = [t for choice in choices for t in (choice["logprobs"] or {}).get("content", ())]
    else:
        (choice,) = reply.json["choices"]
        assert choice["message"]["content"] == result.text
        assert reply.json["usage"]["completion_tokens"] == len(result.tokens)
        tokens = choice["logprobs"]["content"]
    assert len(tokens) == len(result.tokens)


@pytest.mark.parametrize("limit", [1_999, 32_000])
async def test_what_is_left_of_the_context_is_the_limit(engine: BatchedEngine, limit: int) -> None:
    body = {"messages": HELLO, "max_tokens": limit, "logit_bias": {"64": 100}, "stop": "a" * 5}
    reply = await ask(create_app(engine), body)
    assert reply.json["choices"][0]["finish_reason"] == "stop"


async def test_metrics_say_who_has_how_much_memory(engine: BatchedEngine, tiny_path: Path) -> None:
    app = create_app(engine)
    await ask(app, {"messages": HELLO, "max_tokens": 20})
    await settled()
    memory = engine.stats().memory
    lines = (await ask(app, None, "/metrics", method="GET")).data.decode().splitlines()
    told = {
        name: float(value)
        for name, _, value in (one.rpartition(" ") for one in lines if one[0] != "#")
    }
    (model,) = (await ask(app, None, "/health", method="GET")).json["models"]
    for kind in ("weights", "drafts", "live", "stored", "processes"):
        name = f'mlx_engine_memory_bytes{{kind="{kind}",model="{model}"}}'
        assert told[name] == getattr(memory.use, kind)
    for name in ("total", "peak"):
        assert told[f'mlx_engine_memory_{name}_bytes{{model="{model}"}}'] == getattr(memory, name)
    assert f'mlx_engine_memory_limit_bytes{{model="{model}"}}' not in told, "it has no bound"
    assert told[f'mlx_engine_memory_refused_total{{model="{model}"}}'] == memory.refused
    owner = f'mlx_engine_memory_owner_bytes{{model="{model}",owner="{tiny_path}"}}'
    assert told[owner] == memory.use.total > 0
    assert told[f'mlx_engine_preemptions_total{{model="{model}"}}'] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_a_client_that_goes_away_frees_mlx(
    engine: BatchedEngine, gate: MakeGate, stream: bool, where: str
) -> None:
    text = "x" * 1_500 if where == "prefill" else "x"
    inside = gate("model", 5 if where == "prefill" else 20)
    before = engine.stats()
    body = {"messages": [{"role": "user", "content": text + where}], "ignore_eos": True}
    client = Client(create_app(engine), CHAT, {**body, "stream": stream, "max_tokens": 400})
    task = asyncio.create_task(client.run())
    await inside.reached()
    client.leave()
    await asyncio.sleep(0.01)
    assert not task.done(), "the work is inside of MLX"
    inside.go()
    await task
    await until(lambda: engine.stats().cancelled == before.cancelled + 1)
    assert inside.calls < 60
    await settled()
    assert not other_tasks()
