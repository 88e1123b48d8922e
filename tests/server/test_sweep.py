"""Every endpoint, its client gone at every moment, under several schedules.

The simulation is that of ``tests/sweep``: a moment is the point before a step of the event loop
or before a thread goes on. Sockets are left out: a server tells an application that a client has
gone by a message, by an error when it sends something, or not at all and cancels it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_engine import BaseEngine
from mlx_engine.server import create_app
from mlx_engine.testing import FakeAnswer, FakeEngine, FakeRequest
from mlx_engine.testing.safety.ways import ALL_WAYS, LoopClosed, Way, Work
from tests.conftest import make_tiny
from tests.server.asgi import CHAT, Client
from tests.sweep.plays import Kind, loaded_once
from tests.sweep.scene import LOOP_FIRST, SCHEDULES, Scene, Schedule, Unharmed
from tests.sweep.simulation import Simulation, require

pytestmark = [
    pytest.mark.timeout(900),
    # As in the other sweep: of closed event loops.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning"),
]

TOOL = {"name": "look", "parameters": {"type": "object"}}
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {**SAID, "tools": [{"type": "function", "function": TOOL}]}),
    "chats": (CHAT, {**SAID, "n": 2}),
    "completions": ("/v1/completions", {"prompt": "Hi"}),
    "responses": ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", **TOOL}]}),
    "messages": (
        "/v1/messages",
        {
            **SAID,
            "tools": [{"name": "look", "input_schema": {"type": "object"}}],
            "thinking": {"type": "adaptive"},
        },
    ),
    "counts": ("/v1/messages/count_tokens", SAID),
}
REAL = {"max_tokens": 2, "max_output_tokens": 2, "ignore_eos": True}  # tokens of a tiny model


def answer(request: FakeRequest) -> FakeAnswer:
    if request.tools:
        return FakeAnswer("b", reasoning="a", tool_calls=[("look", {})])
    return FakeAnswer("a b")


class Gone(Way[Any]):
    """The client closes its connection, which the application is told."""

    name = "disconnect"
    clients: ClassVar[list[Client]] = []  # those that are at it

    async def run(self, operation: Work[Any]) -> Any:
        task = self._inner = asyncio.ensure_future(operation())
        await asyncio.wait({task})
        result = task.result()  # whatever happens, an application raises nothing
        return None if self.struck else result

    def _strike(self) -> None:
        self.struck = bool(self.clients)  # or it has not come yet
        for client in self.clients:
            self._close(client)

    def _close(self, client: Client) -> None:
        client.leave()


class Cut(Gone):
    """The same, and whatever is sent to it then is an error."""

    name = "disconnect, and sending fails"

    def _close(self, client: Client) -> None:
        client.cut()


WAYS = (*(way for way in ALL_WAYS if way is not LoopClosed), Gone, Cut)


@dataclass
class Swept:
    """An application on an engine, and a request to it."""

    engine: BaseEngine
    path: str
    body: dict[str, Any]
    app: Any = field(init=False)

    def __post_init__(self) -> None:
        self.app = create_app(self.engine)

    def scene(self, late: int, *, beside: bool) -> Scene:
        return Scene(
            self._ask,
            self._probe if beside else None,
            rested=self._rested,
            reset=self._forget,
            probe=self._probe,
            late=late,
        )

    async def _ask(self) -> Any:
        client = Client(self.app, self.path, self.body)
        Gone.clients.append(client)
        try:
            await client.run()
        finally:
            Gone.clients.remove(client)
        if not client.left:
            require(client.status == 200, f"{client.status}: {client.data!r}")
            require(client.over, "the answer has no end")
        require(client.status in (0, 200), f"{client.status}: {client.data!r}")
        return client.data.count(b"data: ")

    async def _probe(self) -> None:
        """Another client gets its answer."""
        client = await Client(self.app, CHAT, {**SAID, **REAL}).run()
        require(client.status == 200 and client.over, f"{client.status}: {client.data!r}")

    def _forget(self) -> None:
        if isinstance(self.engine, FakeEngine):
            self.engine.requests.clear()

    def _rested(self) -> None:
        stats = self.engine.stats()
        require(not (stats.running or stats.waiting or stats.kv_bytes), f"I6: {stats}")
        require(not stats.failed, f"I6: requests have failed: {stats}")
        busy = self.app.routes[0].app._site.access._busy
        require(not busy, f"I6: places are taken: {busy}")


@dataclass
class Loading(Swept):
    """An application that loads its model for the request, and unloads it behind that."""

    def __post_init__(self) -> None:
        self.app = create_app({"fake": lambda: self.engine})

    async def _ask(self) -> Any:
        return await self._unloaded(super()._ask)

    async def _probe(self) -> None:
        await self._unloaded(super()._probe)

    async def _unloaded(self, work: Work[Any]) -> Any:
        models = self.app.state.models
        try:
            return await work()
        finally:
            await models.shutdown(0)
            models._closed = False
            require(not (models._stays or models._here), "I6: a model is there still")


def sweep(simulation: Simulation, scene: Scene, ways: Any, schedule: Schedule) -> int:
    """Play it unharmed, and then struck at every moment, in every way; the number of runs."""
    before = Simulation.runs
    moments = simulation.play(scene, Unharmed(), schedule)
    for way, moment in itertools.product(ways, range(1, moments + 1)):
        try:
            simulation.play(scene, way(), schedule, moment)
        except BaseException as error:
            error.add_note(f"{way.name}, {schedule.name}, moment {moment} of {moments}")
            raise
    return Simulation.runs - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "plain"
    make_tiny(folder, "0", "--layers", "1")
    return folder


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    with Simulation().installed() as simulation:
        yield simulation


Record = Callable[[str, object], None]


@pytest.mark.parametrize("batch", [None, 2], ids=["simple", "batched"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("which", BODIES)
def test_a_client_that_goes_away_at_any_moment(
    simulation: Simulation, which: str, stream: bool, batch: int | None, record_property: Record
) -> None:
    path, body = BODIES[which]
    engine = FakeEngine(answer, max_batch_size=batch)
    simulation.in_a_loop(engine.start)
    try:
        scene = Swept(engine, path, {**body, "stream": stream}).scene(0, beside=batch is not None)
        schedules = SCHEDULES if which == "responses" and stream else (LOOP_FIRST,)
        runs = sum(sweep(simulation, scene, (Gone, Cut), schedule) for schedule in schedules)
    finally:
        simulation.in_a_loop(engine.stop)
    record_property("interleavings", runs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_whoever_runs_the_application_ends_it_in_any_way(
    simulation: Simulation, stream: bool, record_property: Record
) -> None:
    path, body = BODIES["responses"]
    engine = FakeEngine(answer)
    simulation.in_a_loop(engine.start)
    try:
        scene = Swept(engine, path, {**body, "stream": stream}).scene(0, beside=False)
        runs = sweep(simulation, scene, WAYS, LOOP_FIRST)
    finally:
        simulation.in_a_loop(engine.stop)
    record_property("interleavings", runs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_work_ends_soon_after_its_client_has_gone(
    simulation: Simulation, stream: bool, record_property: Record
) -> None:
    engine = FakeEngine("a b c d e f g h i j k l m n o p")
    simulation.in_a_loop(engine.start)
    made = 0

    def tokens() -> int:
        return sum(len(request.result().tokens) for request in engine.requests[:1])

    class Noted(Gone):
        def _strike(self) -> None:
            nonlocal made
            made = tokens()
            super()._strike()

        async def run(self, operation: Work[Any]) -> Any:
            result = await super().run(operation)
            if self.struck:
                late = tokens() - made
                require(late <= 3, f"I3: {late} tokens after the client has gone")
            return result

    try:
        scene = Swept(engine, CHAT, {**SAID, "stream": stream}).scene(0, beside=False)
        runs = sweep(simulation, scene, (Noted,), LOOP_FIRST)
    finally:
        simulation.in_a_loop(engine.stop)
    record_property("interleavings", runs)


@pytest.mark.parametrize("where", ["simple", "batched"])
def test_with_a_real_model(
    simulation: Simulation, folder: Path, where: str, record_property: Record
) -> None:
    with loaded_once(simulation):
        engine = Kind(where).make(folder)
        simulation.in_a_loop(engine.start)
        try:
            scene = Swept(engine, CHAT, {**SAID, **REAL, "stream": True}).scene(4, beside=True)
            runs = sweep(simulation, scene, (Gone, Cut), LOOP_FIRST)
        finally:
            simulation.in_a_loop(engine.stop)
    record_property("interleavings", runs)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_at_any_moment_of_a_load(
    simulation: Simulation, stream: bool, record_property: Record
) -> None:
    path, body = BODIES["messages"]
    scene = Loading(FakeEngine(answer), path, {**body, "stream": stream}).scene(0, beside=False)
    runs = sum(sweep(simulation, scene, (Gone, Cut), schedule) for schedule in SCHEDULES[:3])
    record_property("interleavings", runs)


def test_a_client_that_goes_away_at_any_moment_of_the_load_of_a_real_model(
    simulation: Simulation, folder: Path, record_property: Record
) -> None:
    with loaded_once(simulation):
        engine = Kind("batched").make(folder)
        body = {**SAID, **REAL, "stream": True}
        scene = Loading(engine, CHAT, body).scene(4, beside=False)
        runs = sweep(simulation, scene, (Gone,), LOOP_FIRST)
    record_property("interleavings", runs)
