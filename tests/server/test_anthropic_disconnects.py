"""Clients of Anthropic's API that go away, at every moment, as those of ``test_disconnects``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine, Gate
from tests.conftest import other_tasks
from tests.server.asgi import Client, ask
from tests.server.test_disconnects import STEPS, free
from tests.waiting import until

pytestmark = pytest.mark.anyio

PATH = "/v1/messages"
TOOL = {"name": "read", "input_schema": {"type": "object"}}
BODY: dict[str, Any] = {
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": [TOOL],
    "thinking": {"type": "enabled", "budget_tokens": 9},
}
ANSWER = FakeAnswer("b c", reasoning="a", tool_calls=[("read", {"path": "hello.py"})])


@pytest.mark.parametrize("batch", [None, 3], ids=["simple", "batched"])
@pytest.mark.parametrize("kind", ["whole", "stream", "count"])
async def test_at_every_step_of_the_event_loop(kind: str, batch: int | None) -> None:
    path = f"{PATH}/count_tokens" if kind == "count" else PATH
    async with FakeEngine(ANSWER, max_batch_size=batch) as engine:
        app = create_app(engine)
        endings = set()
        for steps in range(STEPS):
            client = Client(app, path, {**BODY, "stream": kind == "stream"})
            task = asyncio.create_task(client.run())
            for _ in range(steps):
                await asyncio.sleep(0)
            client.leave()
            await task
            await free(engine)
            assert not other_tasks()
            endings.add(client.over)
        assert False in endings
        assert (await ask(app, BODY, path)).status == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("where", ["prefill", "thinking", "text", "queue"])
async def test_wherever_the_request_is(stream: bool, where: str) -> None:
    gate = Gate(firm=True)
    text, thought = ["b", "c"], ["a"]
    if where == "prefill":
        thought.insert(0, gate)  # type: ignore[arg-type]
    else:
        (thought if where == "thinking" else text).insert(1, gate)  # type: ignore[arg-type]
    async with FakeEngine(FakeAnswer(text, reasoning=thought)) as engine:
        app = create_app(engine)
        first = Client(app, PATH, {**BODY, "stream": stream})
        task = asyncio.create_task(first.run())
        await gate.reached()
        leaves, its = first, task
        if where == "queue":
            leaves = Client(app, PATH, {**BODY, "stream": stream})
            its = asyncio.create_task(leaves.run())
            await until(lambda: engine.stats().waiting == 1)
        leaves.leave()
        await until(lambda: its.done() or engine.stats().waiting == 0)
        gate.open()
        await asyncio.gather(task, its)
        assert not leaves.over
        await free(engine)
        assert not other_tasks()
