"""Clients that come in crowds, slowly, or with more than anybody can take."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest

from mlx_engine.server import create_app
from mlx_engine.server.body import Bodies
from mlx_engine.testing import FakeEngine
from tests.conftest import other_tasks, settled
from tests.server.asgi import CHAT, Client, ask
from tests.server.leaving import free
from tests.server.test_disconnects import HELLO
from tests.waiting import until

pytestmark = pytest.mark.anyio

PATHS = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
MEGABYTE = b" " * 2**20


class Trickle(Client):
    """A client whose body comes in pieces, and never to its end.

    Args:
        piece: each of them.
        most: as many come, and then nothing; ``None`` is without an end.
        number: of the client.
    """

    def __init__(
        self, app: Any, path: str, piece: bytes = b"{", *, most: int | None = 1, number: int = 1
    ) -> None:
        super().__init__(app, path)
        self._scope["client"] = (f"10.0.0.{number}", 1)
        self._piece = piece
        self._most = most
        self.pieces = 0

    async def _receive(self) -> dict[str, Any]:
        if self.pieces == self._most:
            await self._gone.wait()
        if self.left:
            return {"type": "http.disconnect"}
        self.pieces += 1
        return {"type": "http.request", "body": self._piece, "more_body": True}


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_without_an_end_is_refused_where_the_limit_is(path: str) -> None:
    async with FakeEngine("Hi.") as engine:
        app = create_app(engine, max_body_bytes=4 * 2**20)
        tracemalloc.start()
        try:
            client = Trickle(app, path, MEGABYTE, most=None)
            await client.run()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert client.status == 413
        assert client.json["error"]["message"]
        assert client.pieces == 5
        assert peak < 16 * 2**20
        assert not engine.requests


async def test_bodies_that_trickle_hold_nobody_up() -> None:
    async with FakeEngine("Hi.", max_batch_size=4) as engine:
        app = create_app(engine, max_requests_per_client=8, body_seconds=0.5)
        slow = [Trickle(app, PATHS[n % 5], number=n // 8) for n in range(400)]
        tasks = [asyncio.create_task(client.run()) for client in slow]
        await asyncio.sleep(0)
        assert (await ask(app, HELLO)).status == 200
        for client in slow[::2]:
            client.leave()
        await asyncio.gather(*tasks)
        assert {client.status for client in slow[::2]} <= {0, 408}  # on a busy machine
        assert {client.status for client in slow[1::2]} == {408}
        await free(engine)
        assert not other_tasks()


async def test_bodies_that_trickle_do_not_hold_up_their_own_client_either() -> None:
    async with FakeEngine("Hi.", max_batch_size=4) as engine:
        app = create_app(engine, max_requests_per_client=8)
        slow = [Trickle(app, PATHS[n % 5]) for n in range(100)]
        tasks = [asyncio.create_task(client.run()) for client in slow]
        await until(lambda: sum(client.over for client in slow) == 92)
        assert {client.status for client in slow[:92]} == {429}, "those that began first"
        assert "send it again" in slow[0].json["error"]["message"]
        last = Client(app, CHAT, HELLO)
        last._scope["client"] = slow[0]._scope["client"]
        await last.run()
        assert last.status == 200
        for client in slow:
            client.leave()
        await asyncio.gather(*tasks)
        await free(engine)
        assert not bodies(app)._coming


async def test_what_is_there_of_all_bodies_has_a_bound() -> None:
    async with FakeEngine("Hi.", max_batch_size=4) as engine:
        app = create_app(engine, max_body_bytes=2 * 2**20)
        tracemalloc.start()
        try:
            slow = [Trickle(app, CHAT, MEGABYTE, most=2, number=n) for n in range(40)]
            tasks = [asyncio.create_task(client.run()) for client in slow]
            await until(lambda: sum(client.over for client in slow) == 36)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert {client.status for client in slow[:36]} == {429}
        assert bodies(app)._bytes == 8 * 2**20
        assert held < 16 * 2**20
        assert (await ask(app, HELLO)).status == 200
        for client in slow:
            client.leave()
        await asyncio.gather(*tasks)
        assert bodies(app)._bytes == 0


def bodies(app: Any) -> Bodies:
    found: Bodies = app.routes[0].app._site.bodies
    return found


async def test_a_crowd_that_comes_stays_and_vanishes() -> None:
    """Every request is answered, refused or gone; and nothing stays of any."""
    async with FakeEngine("a b c", max_batch_size=8, queue_limit=300) as engine:
        app = create_app(engine, max_requests_per_client=1_000)
        bodies = {CHAT: HELLO, "/v1/responses": {"input": "Hi"}, "/v1/messages": HELLO}
        paths = list(bodies)
        clients = [
            Client(app, (path := paths[n % 3]), {**bodies[path], "stream": n % 2 == 0})
            for n in range(600)
        ]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        for _ in range(20):
            await asyncio.sleep(0)
        for client in clients[::3]:
            client.leave()
        await asyncio.gather(*tasks)
        assert {client.status for client in clients} <= {0, 200, 429}
        stayed = [client for client in clients if not client.left]
        assert all(client.over for client in stayed)
        assert sum(client.status == 200 for client in stayed) >= 200
        assert engine.stats().running == engine.stats().waiting == 0
        await settled()
        assert not other_tasks()
        assert not app.routes[0].app._site.access._busy
