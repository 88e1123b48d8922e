"""Clients of Anthropic's API that go away, at every moment, as those of ``test_disconnects``."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_engine.testing import FakeAnswer, FakeEngine, Gate
from tests.server.leaving import leave_at, leave_at_every_step

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
        await leave_at_every_step(engine, path, {**BODY, "stream": kind == "stream"})


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
        await leave_at(engine, PATH, {**BODY, "stream": stream}, gate, queued=where == "queue")
