"""Several models: each in memory when it is asked for, and out again, never under a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BatchedEngine, EngineDead, EngineState, InvalidRequest, ModelLoadError
from mlx_engine.server import ServedModel, create_app, models
from mlx_engine.testing import FakeEngine, Gate
from tests.conftest import other_tasks, settled
from tests.server.asgi import CHAT, Client, ask
from tests.waiting import until

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
PATHS = {
    CHAT: HELLO,
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": HELLO,
    "/v1/messages/count_tokens": HELLO,
}


class Rack:
    """Makes fake engines, and remembers them."""

    def __init__(self, **options: Any) -> None:
        self.made: dict[str, list[FakeEngine]] = {}
        self.options: dict[str, dict[str, Any]] = {}
        self.common = options

    def maker(self, name: str, **options: Any) -> Callable[[], FakeEngine]:
        def make() -> FakeEngine:
            engine = FakeEngine(**{"answers": f"I am {name}.", **self.common, **options})
            self.made.setdefault(name, []).append(engine)
            return engine

        return make

    def loaded(self) -> set[str]:
        return {
            name
            for name, engines in self.made.items()
            if any(engine.state is EngineState.RUNNING for engine in engines)
        }

    def starts(self, name: str) -> int:
        return len(self.made.get(name, []))


@contextlib.asynccontextmanager
async def served(rack: Rack, *names: str, **options: Any) -> AsyncIterator[Any]:
    app = create_app({name: rack.maker(name) for name in names}, **options)
    async with app.router.lifespan_context(app):
        yield app
    assert not rack.loaded()
    await settled()
    assert not other_tasks()


async def said(app: Any, model: str, **more: Any) -> str:
    reply = await ask(app, {**HELLO, "model": model, **more})
    assert reply.status == 200, reply.data
    return str(reply.json["choices"][0]["message"]["content"])


async def states(app: Any) -> dict[str, str]:
    reply = await ask(app, None, "/v1/models", method="GET")
    return {model["id"]: model["state"] for model in reply.json["data"]}


async def test_each_is_loaded_when_it_is_asked_for() -> None:
    rack = Rack()
    async with served(rack, "org/one", "org/two") as app:
        assert await states(app) == {"org/one": "unloaded", "org/two": "unloaded"}
        assert (await ask(app, None, "/health", method="GET")).status == 200
        assert await said(app, "org/two") == "I am org/two."
        assert await states(app) == {"org/one": "unloaded", "org/two": "running"}
        assert await said(app, "one") == "I am org/one."
        assert await said(app, "org/two") == "I am org/two."
        assert rack.starts("org/two") == rack.starts("org/one") == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_endpoint_waits_for_a_load(path: str, stream: bool) -> None:
    gate = Gate()
    rack = Rack(load=[gate])
    async with served(rack, "one", keep_alive_seconds=0.005) as app:
        client = Client(app, path, {**PATHS[path], "stream": stream, "model": "one"})
        task = asyncio.create_task(client.run())
        await gate.reached()
        assert await states(app) == {"one": "loading"}
        health = await ask(app, None, "/health", method="GET")
        assert (health.status, health.json["status"]) == (503, "loading")
        if stream and "count" not in path:
            await until(lambda: client.data.count(b"data: ") > 3)
        gate.open()
        await task
        assert client.status == 200
        assert client.over


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_load_that_fails_is_told_and_can_be_tried_again(
    path: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loads = iter([[ModelLoadError("no such folder")], []])
    rack = Rack()
    app = create_app({"one": rack.maker("one", load=loads), "two": rack.maker("two")})
    async with app.router.lifespan_context(app):
        body = {**PATHS[path], "stream": stream, "model": "one"}
        for _ in range(3):  # clients come again at once; only the first one has it loaded
            reply = await ask(app, body, path)
            assert reply.status == 503
            assert 1 <= int(reply.headers["retry-after"]) <= 5
            assert "one cannot be loaded: no such folder" in reply.json["error"]["message"]
        assert rack.starts("one") == 1
        assert (await states(app))["one"] == "failed"
        assert (await ask(app, None, "/health", method="GET")).status == 200, "two can answer"
        assert await said(app, "two") == "I am two."
        app.state.models.names["one"].retry_at = 0.0
        assert (await ask(app, body, path)).status == 200
        assert rack.starts("one") == 2
    await settled()
    assert not other_tasks()


async def test_a_load_that_fails_behind_signs_of_life_is_an_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    rack = Rack(load=[gate, ModelLoadError("no memory left")])
    async with served(rack, "one", keep_alive_seconds=0.005) as app:
        client = Client(app, CHAT, {**HELLO, "stream": True})
        task = asyncio.create_task(client.run())
        await until(lambda: client.data)
        gate.open()
        await task
        assert client.over
        assert "no memory left" in client.events[-1]["error"]["message"]


async def test_what_the_options_of_a_model_do_wrong_is_not_the_clients_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rack = Rack(load=[InvalidRequest("adapter_path", "does not fit")])
    async with served(rack, "one") as app:
        reply = await ask(app, HELLO)
        assert reply.status == 503
        assert reply.json["error"]["param"] is None


async def test_a_client_that_leaves_during_a_load_is_out_at_once_and_the_load_goes_on() -> None:
    gate = Gate()
    rack = Rack(load=[gate])
    async with served(rack, "one", "two") as app:
        for stream in (False, True):
            client = Client(app, CHAT, {**HELLO, "stream": stream, "model": "one"})
            task = asyncio.create_task(client.run())
            await gate.reached()
            client.leave()
            await task
            assert not client.over
        assert (await states(app))["one"] == "loading"
        gate.open()
        assert await said(app, "one") == "I am one."
        assert rack.starts("one") == 1


async def test_what_is_idle_is_unloaded() -> None:
    rack = Rack()
    async with served(rack, "one", "two", idle_timeout=0.05) as app:
        await said(app, "one")
        assert rack.loaded() == {"one"}
        await until(lambda: not rack.loaded())
        await until(lambda: app.state.models.names["one"].state == "unloaded")
        assert (await ask(app, None, "/health", method="GET")).status == 200
        assert await said(app, "one") == "I am one."
        assert rack.starts("one") == 2


async def test_a_request_is_no_idleness() -> None:
    gate = Gate()
    rack = Rack(answers=["a", gate, "b"])
    async with served(rack, "one", "two", idle_timeout=0.01) as app:
        task = asyncio.create_task(said(app, "one"))
        await gate.reached()
        await asyncio.sleep(0.05)
        assert rack.loaded() == {"one"}
        gate.open()
        assert await task == "ab"


async def test_the_one_used_least_recently_makes_room() -> None:
    rack = Rack()
    async with served(rack, "one", "two", "three", max_loaded_models=2) as app:
        for name in ("one", "two", "one", "three"):
            await said(app, name)
        assert rack.loaded() == {"one", "three"}
        await said(app, "two")
        assert rack.loaded() == {"two", "three"}


@pytest.mark.parametrize(("memory", "stay"), [(100, {"large"}), (130, {"two", "large"})])
async def test_memory_makes_room_too(memory: int, stay: set[str]) -> None:
    rack = Rack()
    sizes = {"one": 40, "two": 30, "large": 90}
    app = create_app(
        {
            name: ServedModel(rack.maker(name), lambda size=size: size)  # type: ignore[misc]
            for name, size in sizes.items()
        },
        memory_bytes=memory,
    )
    async with app.router.lifespan_context(app):
        for name in sizes:
            await said(app, name)
        assert rack.loaded() == stay


async def test_a_model_alone_may_take_more_than_there_is() -> None:
    rack = Rack()
    served_model = ServedModel(rack.maker("one"), lambda: 1_000)
    app = create_app({"one": served_model}, memory_bytes=10)
    async with app.router.lifespan_context(app):
        assert await said(app, "one") == "I am one."


async def test_a_size_that_is_known_only_afterwards_makes_room_then() -> None:
    rack = Rack()
    sizes = iter([None, 90])
    app = create_app(
        {
            "one": ServedModel(rack.maker("one"), lambda: 40),
            "fetched": ServedModel(rack.maker("fetched"), lambda: next(sizes)),
        },
        memory_bytes=100,
    )
    async with app.router.lifespan_context(app):
        await said(app, "one")
        await said(app, "fetched")
        await until(lambda: rack.loaded() == {"fetched"})


async def test_nothing_is_unloaded_under_a_request_and_whoever_comes_later_waits() -> None:
    gate = Gate()
    rack = Rack()
    app = create_app(
        {"one": rack.maker("one", answers=["a", gate, "b"]), "two": rack.maker("two")},
        max_loaded_models=1,
    )
    async with app.router.lifespan_context(app):
        first = asyncio.create_task(said(app, "one"))
        await gate.reached()
        second = asyncio.create_task(said(app, "two"))
        await until(lambda: app.state.models.names["one"].stay is None)
        third = asyncio.create_task(said(app, "one"))
        await asyncio.sleep(0.01)
        assert rack.loaded() == {"one"}
        assert not any(task.done() for task in (first, second, third))
        gate.open()
        assert await asyncio.gather(first, second, third) == ["ab", "I am two.", "ab"]
        assert rack.starts("one") == 2, "two was there in between"
        assert rack.loaded() == {"one"}


async def test_two_models_with_room_for_one_are_both_served_whatever_comes() -> None:
    rack = Rack()
    async with served(rack, "one", "two", max_loaded_models=1) as app:
        names = ["one", "two"] * 20
        answers = await asyncio.gather(*(said(app, name) for name in names))
        assert answers == [f"I am {name}." for name in names]
        assert rack.starts("one") + rack.starts("two") <= 4


async def test_a_load_that_nobody_waits_for_makes_room() -> None:
    gate = Gate()
    rack = Rack()
    app = create_app(
        {"one": rack.maker("one", load=[gate]), "two": rack.maker("two")}, max_loaded_models=1
    )
    async with app.router.lifespan_context(app):
        client = Client(app, CHAT, {**HELLO, "model": "one"})
        task = asyncio.create_task(client.run())
        await gate.reached()
        client.leave()
        await task
        other = asyncio.create_task(said(app, "two"))
        await until(lambda: app.state.models.names["one"].stay is None)
        gate.open()  # a load stops where it can
        assert await other == "I am two."


async def test_nobody_makes_room_for_nobody() -> None:
    gate = Gate()
    rack = Rack()
    app = create_app(
        {
            "one": rack.maker("one", answers=[gate, "a"]),
            **{n: rack.maker(n) for n in ("two", "three")},
        },
        max_loaded_models=1,
    )
    async with app.router.lifespan_context(app):
        first = asyncio.create_task(said(app, "one"))
        await gate.reached()
        waits = [asyncio.create_task(said(app, "two"))]
        await until(lambda: app.state.models.names["one"].stay is None)
        client = Client(app, CHAT, {**HELLO, "model": "three"})
        leaves = asyncio.create_task(client.run())
        await until(lambda: app.state.models.names["three"].stay is not None)
        client.leave()
        await leaves
        gate.open()
        assert await asyncio.gather(first, *waits) == ["a", "I am two."]
        await until(lambda: app.state.models.names["three"].stay is None)
        assert rack.loaded() == {"two"}
        assert not rack.starts("three")


async def test_an_engine_that_has_died_is_made_anew() -> None:
    rack = Rack()
    async with served(rack, "one", "two") as app:
        await said(app, "one")
        rack.made["one"][0].die(EngineDead("gone"))
        await until(lambda: rack.made["one"][0].state is EngineState.FAILED)
        assert await said(app, "one") == "I am one."
        assert rack.starts("one") == 2


@pytest.mark.parametrize("where", ["load", "answer"])
async def test_the_end_of_the_application_ends_everything(where: str) -> None:
    gate = Gate()
    rack = Rack(load=[gate]) if where == "load" else Rack(answers=["a", gate])
    app = create_app({"one": rack.maker("one")})
    async with app.router.lifespan_context(app):
        task = asyncio.create_task(ask(app, HELLO))
        await gate.reached()
        ending = asyncio.create_task(app.state.models.shutdown(0))
        await asyncio.sleep(0.01)
        refused = await ask(app, HELLO)
        assert refused.status == 503
        gate.open()
        await ending
        assert (await task).status == 503
    assert not rack.loaded()
    await settled()
    assert not other_tasks()


async def test_requests_in_flight_may_finish() -> None:
    gate = Gate()
    rack = Rack(answers=["a", gate, "b"])
    app = create_app({"one": rack.maker("one")})
    task = asyncio.create_task(ask(app, HELLO))
    await gate.reached()
    ending = asyncio.create_task(app.state.models.shutdown(None))
    await asyncio.sleep(0.01)
    gate.open()
    report = await ending
    assert (await task).status == 200
    assert len(report.finished) == 1


NAMES = ("org/tiny", "org/large", "other/large", "alias")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("org/tiny", "org/tiny"),
        ("tiny", "org/tiny"),
        ("openai/org/tiny", "org/tiny"),
        ("openai/alias", "alias"),
        ("org/large", "org/large"),
        ("large", None),  # there are two
        ("ny", None),
        ("TINY", None),
        ("", None),
        ("x" * 10_000, None),
    ],
)
async def test_names(asked: str, found: str | None) -> None:
    rack = Rack()
    async with served(rack, *NAMES) as app:
        for path, body in PATHS.items():
            reply = await ask(app, {**body, "model": asked}, path)
            if found is None:
                assert reply.status == 404
                assert all(name in reply.json["error"]["message"] for name in NAMES)
                assert len(reply.data) < 1_000
            else:
                assert reply.status == 200
                assert reply.headers.get("x-mlx-engine-model", asked) == found
                assert reply.json.get("model", found) == found
                assert set(rack.made) == {found}


async def test_the_only_model_goes_by_every_name_and_says_so() -> None:
    rack = Rack()
    async with served(rack, "org/tiny") as app:
        reply = await ask(app, {**HELLO, "model": "gpt-5"})
        assert reply.status == 200
        assert reply.headers["x-mlx-engine-model"] == reply.json["model"] == "org/tiny"
        assert "x-mlx-engine-model" not in (await ask(app, {**HELLO, "model": "org/tiny"})).headers
        missing = await ask(app, None, "/v1/models/gpt-5", method="GET")
        assert missing.status == 404


async def test_a_model_may_have_several_names() -> None:
    rack = Rack()
    make = rack.maker("one")
    app = create_app({"a": make, "b": make})
    async with app.router.lifespan_context(app):
        assert await said(app, "a") == await said(app, "b") == "I am one."
        assert rack.starts("one") == 1
        assert await states(app) == {"a": "running", "b": "running"}


def test_what_cannot_be_served() -> None:
    for given in ({}, {"": FakeEngine}, {1: FakeEngine}, FakeEngine, ServedModel(FakeEngine)):
        with pytest.raises(InvalidRequest, match="engine"):
            create_app(given)  # type: ignore[arg-type]
    for option in ("idle_timeout", "max_loaded_models", "memory_bytes"):
        with pytest.raises(InvalidRequest, match=option):
            create_app(FakeEngine(), **{option: 0})


async def test_metrics_tell_of_those_that_are_there() -> None:
    rack = Rack()
    async with served(rack, "one", "two") as app:
        await said(app, "one")
        text = (await ask(app, None, "/metrics", method="GET")).data.decode()
        assert 'mlx_engine_loaded{model="one"} 1.0' in text
        assert 'mlx_engine_loaded{model="two"} 0.0' in text
        assert 'mlx_engine_finished_total{model="one"} 1.0' in text


async def test_real_models_take_turns_in_memory(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines in this process, one MLX thread, and room for one."""
    monkeypatch.setattr(models, "_AGAIN", 0.0)
    made: list[BatchedEngine] = []

    def make() -> BatchedEngine:
        made.append(BatchedEngine(tiny_path, context_length=500))
        return made[-1]

    app = create_app({"one": make, "two": lambda: make()}, max_loaded_models=1)
    async with app.router.lifespan_context(app):
        bodies = [
            {**HELLO, "model": name, "max_tokens": 20, "ignore_eos": True, "stream": name == "one"}
            for name in ("one", "two") * 3
        ]
        replies = await asyncio.gather(*(ask(app, body) for body in bodies))
        assert {reply.status for reply in replies} == {200}
        running = [engine for engine in made if engine.state is EngineState.RUNNING]
        assert len(running) == 1
        assert len(made) <= 4
    assert all(engine.state is EngineState.STOPPED for engine in made)
