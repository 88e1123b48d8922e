"""A client that goes away, at every moment: its request is cancelled, and nothing stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine, Gate
from tests.conftest import other_tasks
from tests.server.asgi import CHAT, Client, ask
from tests.server.leaving import STEPS, free, leave_at, leave_at_every_step
from tests.waiting import until

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(params=[None, 3], ids=["simple", "batched"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[FakeEngine]:
    async with FakeEngine("a b c d e f", max_batch_size=request.param) as engine:
        yield engine


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("n", [1, 2])
async def test_at_every_step_of_the_event_loop(engine: FakeEngine, stream: bool, n: int) -> None:
    await leave_at_every_step(engine, CHAT, {**HELLO, "stream": stream, "n": n})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("where", ["prefill", "decode", "queue"])
async def test_wherever_the_request_is(stream: bool, where: str) -> None:
    gate = Gate(firm=True)
    pieces: list[Any] = [gate, "a"] if where == "prefill" else ["a", gate, "b"]
    async with FakeEngine(pieces) as engine:
        await leave_at(engine, CHAT, {**HELLO, "stream": stream}, gate, queued=where == "queue")


async def test_the_handler_itself_is_cancelled(engine: FakeEngine) -> None:
    app = create_app(engine)
    for steps in range(STEPS):
        client = Client(app, CHAT, {**HELLO, "stream": True})
        async with anyio.create_task_group() as group:
            group.start_soon(client.run)
            for _ in range(steps):
                await asyncio.sleep(0)
            group.cancel_scope.cancel()
        await free(engine)
    assert not other_tasks()


async def test_one_that_reads_nothing_holds_nobody_up() -> None:
    async with FakeEngine("a b c d e f " * 100) as engine:
        app = create_app(engine, keep_alive_seconds=0.01, patience_seconds=0.2)
        slow = Client(app, CHAT, {**HELLO, "stream": True}, slow=True)
        task = asyncio.create_task(slow.run())
        assert (await ask(app, HELLO)).status == 200
        assert engine.requests[0].outcome == "finished"
        await asyncio.wait_for(task, 30)  # by itself: it was given up
        await free(engine)


async def test_one_that_does_not_read_the_last_event_is_given_up_too() -> None:
    async with FakeEngine("Hi.") as engine:
        app = create_app(engine, keep_alive_seconds=0.01, patience_seconds=0.2)
        client = StopsReading(app, CHAT, {**HELLO, "stream": True})
        await asyncio.wait_for(client.run(), 30)  # by itself
        assert client.over
        await free(engine)
    assert not other_tasks()


class StopsReading(Client):
    """A client that reads all but the last event."""

    async def _send(self, message: Any) -> None:
        self._slow = message["type"] == "http.response.body" and not message.get("more_body")
        await super()._send(message)


async def test_before_its_body_is_there(engine: FakeEngine) -> None:
    client = Client(create_app(engine), CHAT, HELLO)
    client._given.clear()
    client.leave()
    await client.run()
    assert not client.status
    assert not engine.requests


async def test_while_several_wait_others_go_on(engine: FakeEngine) -> None:
    app = create_app(engine, max_requests_per_client=1_000)
    clients = [Client(app, CHAT, {**HELLO, "stream": n % 2 == 0}) for n in range(60)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    await until(lambda: engine.stats().running)
    for client in clients[::3]:
        client.leave()
    await asyncio.gather(*tasks)
    assert all(client.over for n, client in enumerate(clients) if n % 3)
    await free(engine)
    assert not other_tasks()
