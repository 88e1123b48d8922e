"""Whose request goes to the engine next."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from mlx_engine.engine.many import at_once
from mlx_engine.server import create_app
from mlx_engine.server.failures import Failure
from mlx_engine.server.turns import Asker, Turns
from mlx_engine.testing import FakeEngine, Gate
from tests.server.asgi import Client, ask
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio


class Room:
    """Requests that want turns of an engine, and hold them until they are told to end."""

    def __init__(self, engine: FakeEngine) -> None:
        self.turns = Turns()
        self.engine = engine
        self.order: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, client: str, number: int, user: str = "") -> None:
        name = f"{client}{user}{number}"
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, Asker(client.encode(), user)))
        await asyncio.sleep(0)

    async def _hold(self, name: str, asker: Asker) -> None:
        async with self.turns.turn(asker, self.engine):
            self.order.append(name)
            await self._ends[name].wait()

    async def end_all(self) -> list[str]:
        """End them in the order of their turns; that order."""
        done = 0
        await turns()
        while done < len(self.order):
            name = self.order[done]
            self._ends[name].set()
            with contextlib.suppress(asyncio.CancelledError):
                await self.tasks[name]
            done += 1
            await turns()
        assert all(task.done() for task in self.tasks.values())
        assert not self.turns.waiting
        for left in ("_lines", "_by_asker", "_by_client", "_last", "_given"):
            assert not getattr(self.turns, left), left
        return self.order


@pytest.fixture
def room() -> Room:
    return Room(FakeEngine(max_wait=60))  # one turn at a time, and nobody waits in the engine


async def test_a_crowd_of_one_client_does_not_delay_another(room: Room) -> None:
    for number in range(5):
        await room.come("a", number)
    await room.come("b", 0)
    await room.come("c", 0)
    await room.come("b", 1)
    order = await room.end_all()
    assert order[:3] == ["a0", "b0", "c0"]
    assert order[3:] == ["a1", "b1", "a2", "a3", "a4"]


async def test_users_of_a_client_share_its_turns(room: Room) -> None:
    for number in range(3):
        await room.come("a", number, "ann")
    await room.come("a", 0, "bob")
    await room.come("b", 0)
    order = await room.end_all()
    assert order[0] == "aann0"
    assert set(order[1:3]) == {"abob0", "b0"}
    assert order[3:] == ["aann1", "aann2"]


async def test_who_has_less_in_work_goes_first() -> None:
    room = Room(FakeEngine(max_batch_size=3, max_wait=60))
    for number in range(4):
        await room.come("a", number)
    await room.come("b", 0)
    await room.come("b", 1)
    assert room.order == ["a0", "a1", "a2"]
    order = await room.end_all()
    assert order[3:] == ["b0", "a3", "b1"]


async def test_those_that_leave_take_nothing_with_them(room: Room) -> None:
    for number in range(4):
        await room.come("a", number)
        await room.come("b", number)
    for name in ("a0", "a1", "b2"):
        room.tasks[name].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    order = await room.end_all()
    assert set(order) == {"a0", "b0", "b1", "a2", "a3", "b3"}


async def test_who_is_cancelled_with_a_turn_in_hand_gives_it_back(room: Room) -> None:
    await room.come("a", 0)
    await room.come("b", 0)
    await room.come("c", 0)
    room.tasks["a0"].cancel()
    await asyncio.sleep(0)  # the turn is b's now, which does not know yet
    room.tasks["b0"].cancel()
    order = await room.end_all()
    assert order in (["a0", "c0"], ["a0", "b0", "c0"])


async def test_the_limits_of_the_engine_hold_here() -> None:
    engine = FakeEngine(max_batch_size=4, queue_limit=3)
    room = Room(engine)
    through = at_once(engine.width, engine.queue_limits)
    for number in range(7):
        await room.come("a", number)
    assert len(room.order) == through == 6
    with pytest.raises(Failure, match="busy") as refused:
        async with room.turns.turn(Asker(b"b"), engine):
            pass
    assert refused.value.status == 429
    assert refused.value.retry_after
    await room.end_all()


async def test_nobody_waits_longer_than_the_engine_allows() -> None:
    engine = FakeEngine(max_wait=0.01)
    room = Room(engine)
    await room.come("a", 0)
    with pytest.raises(Failure, match=r"within 0\.01 s"):
        async with room.turns.turn(Asker(b"b"), engine):
            pass
    assert await room.end_all() == ["a0"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
async def test_a_request_goes_ahead_of_another_clients_crowd(path: str, body: Any) -> None:
    gate = Gate()
    answers = iter([[gate, "a"], *["b"] * 20])
    async with FakeEngine(answers) as engine:
        app = create_app(engine)

        def named(user: str) -> dict[str, Any]:
            if "messages" in path:
                return {**body, "metadata": {"user_id": user}}
            return {**body, "user": user}

        ended: list[str] = []

        async def one(user: str) -> None:
            assert (await ask(app, named(user), path)).status == 200
            ended.append(user)

        crowd = [asyncio.create_task(one("many")) for _ in range(8)]
        await gate.reached()
        await until(lambda: app.state.models.names["fake"].turns.waiting == 6)
        single = asyncio.create_task(one("single"))
        await asyncio.sleep(0.01)
        gate.open()
        await asyncio.gather(*crowd, single)
        # One was in work, and one in the engine's own queue.
        assert ended.index("single") == 2


async def test_answers_of_one_request_have_a_turn_each() -> None:
    async with FakeEngine("a") as engine:
        app = create_app(engine)
        body = {"messages": [{"role": "user", "content": "Hi"}], "n": 5}
        assert len((await ask(app, body)).json["choices"]) == 5
        assert app.state.models.names["fake"].turns.waiting == 0


async def test_a_client_that_waits_for_its_turn_may_go() -> None:
    gate = Gate()
    async with FakeEngine([gate, "a"]) as engine:
        app = create_app(engine)
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        clients = [Client(app, body=body) for _ in range(6)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        await gate.reached()
        line = app.state.models.names["fake"].turns
        await until(lambda: line.waiting == 4)
        clients[-1].leave()
        await tasks[-1]
        assert line.waiting == 3
        gate.open()
        await asyncio.gather(*tasks)
        assert not line.waiting
