"""Clients that go away: at every step of the event loop, and wherever a request is."""

from __future__ import annotations

import asyncio
from typing import Any

from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine, Gate
from tests.conftest import other_tasks, settled
from tests.server.asgi import Client, ask
from tests.waiting import until

STEPS = 60  # turns of the event loop, more than a request has


async def free(engine: FakeEngine) -> None:
    """Nothing of any request is left."""
    assert engine.stats().running == engine.stats().waiting == 0
    assert {request.outcome for request in engine.requests} <= {"finished", "cancelled"}
    await settled()


async def leave_at_every_step(engine: FakeEngine, path: str, body: dict[str, Any]) -> None:
    """Go away after each number of turns of the event loop: nothing is left, and others come in."""
    app = create_app(engine)
    endings = set()
    for steps in range(STEPS):
        client = Client(app, path, body)
        task = asyncio.create_task(client.run())
        for _ in range(steps):
            await asyncio.sleep(0)
        client.leave()
        await task
        await free(engine)
        assert not other_tasks()
        endings.add(client.over)
    assert False in endings
    assert (await ask(app, {**body, "stream": False, "n": 1}, path)).status == 200


async def leave_at(
    engine: FakeEngine, path: str, body: dict[str, Any], gate: Gate, *, queued: bool
) -> None:
    """Go away while the engine stands at a gate: with the request there, or one that waits."""
    app = create_app(engine)
    first = Client(app, path, body)
    task = asyncio.create_task(first.run())
    await gate.reached()
    leaves, its = first, task
    if queued:
        leaves = Client(app, path, body)
        its = asyncio.create_task(leaves.run())
        await until(lambda: engine.stats().waiting == 1)
    leaves.leave()
    await until(lambda: its.done() or engine.stats().waiting == 0)
    if not queued:
        await asyncio.sleep(0.01)
        assert not task.done(), "the work is inside of MLX, and so is its request"
    gate.open()
    await asyncio.gather(task, its)
    assert not leaves.over
    await free(engine)
    assert not other_tasks()
