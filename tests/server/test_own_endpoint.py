"""Endpoints of an application's own: their work ends when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from mlx_engine import GenerationError, MLXEngineError
from mlx_engine.server import StreamingAnswer, while_connected
from mlx_engine.testing import FakeEngine, Gate
from tests.conftest import other_tasks
from tests.server.asgi import Client, ask
from tests.server.leaving import STEPS, free
from tests.test_web import Site
from tests.waiting import until

pytestmark = pytest.mark.anyio

PATHS = ("/text", "/events", "/whole")


def application(engine: FakeEngine, *, middleware: bool = False) -> Starlette:
    """With an endpoint of each kind; what they answer is the engine's."""

    async def text(request: Request) -> Response:
        return StreamingAnswer(engine.stream_generate(await request.json()).text())

    async def events(request: Request) -> Response:
        stream = engine.stream_generate(await request.json())

        async def lines() -> AsyncIterator[str]:
            async with stream:
                async for chunk in stream:
                    yield f"data: {chunk.text}\n\n"

        media_type = "text/event-stream"
        return StreamingAnswer(lines(), media_type=media_type, failed="error: {}".format)

    async def whole(request: Request) -> Response:
        result = await while_connected(request, engine.generate(await request.json()))
        return PlainTextResponse(result.text)

    async def refuse(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 500)

    async def on(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    return Starlette(
        routes=[
            Route(f"/{each.__name__}", each, methods=["POST"]) for each in (text, events, whole)
        ],
        exception_handlers={MLXEngineError: refuse},
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=on)] if middleware else [],
    )


@contextlib.asynccontextmanager
async def served(app: Starlette, engine: FakeEngine) -> AsyncIterator[Site]:
    """The application on a port of its own."""
    door = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[door]))
    try:
        await until(lambda: server.started or serving.done())
        yield Site(door.getsockname()[1], {"engine": engine})
    finally:
        server.should_exit = True
        await serving
        door.close()


@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "middleware"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["prefill", "decode", "queue"])
async def test_a_client_that_vanishes_frees_the_engine(
    path: str, where: str, middleware: bool
) -> None:
    gate = Gate()
    pieces: list[Any] = ["a", gate, "b"] if where == "decode" else [gate, "a"]
    async with FakeEngine({"Hi": pieces, "Bye": "over"}) as engine:
        async with served(application(engine, middleware=middleware), engine) as site:
            async with site.post("Hi", path) as first:
                await gate.reached()
                if where == "queue":
                    async with site.post("Hi", path) as second:
                        await site.until(lambda stats: stats.waiting == 1)
                        second.vanish()
                        await site.until(lambda stats: stats.waiting == 0)
                    assert [request.outcome for request in engine.requests] == [
                        "running",
                        "cancelled",
                    ]
                first.vanish()
                await until(lambda: {one.outcome for one in engine.requests} == {"cancelled"})
            assert not gate.is_open, "nobody else has freed it"
            async with site.post("Bye", path) as other:
                assert (await other.head()).status == 200
        await free(engine)
    assert not other_tasks()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [None, 3], ids=["simple", "batched"])
async def test_at_every_step_of_the_event_loop(path: str, batch: int | None) -> None:
    async with FakeEngine("a b c d e f", max_batch_size=batch) as engine:
        app = application(engine)
        statuses = set()
        for steps in range(STEPS):
            client = Client(app, path, "Hi")
            task = asyncio.create_task(client.run())
            for _ in range(steps):
                await asyncio.sleep(0)
            client.leave()
            await task
            await free(engine)
            assert not other_tasks()
            statuses.add(client.status)
        assert 499 in statuses
        assert (await ask(app, "Hi", path)).status == 200


@pytest.mark.parametrize("path", ["/text", "/events"])
async def test_one_that_reads_nothing_and_leaves(path: str) -> None:
    async with FakeEngine("a b c d e f " * 100) as engine:
        client = Client(application(engine), path, "Hi", slow=True)
        task = asyncio.create_task(client.run())
        await until(lambda: client.status)
        client.leave()
        await task
        assert not client.over
        await free(engine)
    assert not other_tasks()


async def test_a_server_that_tells_of_it_when_something_is_sent() -> None:
    gate = Gate()
    async with FakeEngine(["a", gate, "b"]) as engine:
        client = Client(application(engine), "/text", "Hi")
        task = asyncio.create_task(client.run())
        await gate.reached()
        client._cut = True
        gate.open()
        await task
        assert not client.over
        await free(engine)


async def test_errors_before_the_first_text_have_a_status_and_later_ones_a_text() -> None:
    script = {"early": [GenerationError("no")], "late": ["a", GenerationError("no more")]}
    async with FakeEngine(script) as engine:
        app = application(engine)
        for path in PATHS:
            early = await Client(app, path, "early").run()
            assert (early.status, "no" in early.data.decode()) == (500, True)
        late = await Client(app, "/events", "late").run()
        assert (late.status, late.over) == (200, True)
        assert late.data.decode().startswith("data: a\n\n")
        assert late.data.decode().endswith("error: no more")
        assert late.headers["content-type"].startswith("text/event-stream")
        assert late.headers["x-accel-buffering"] == "no"
        cut = Client(app, "/text", "late")
        with pytest.raises(RuntimeError, match="already started"):
            await cut.run()
        assert (cut.status, cut.data, cut.over) == (200, b"a", False)
    assert not other_tasks()


async def test_an_answer_without_text_is_one() -> None:
    async def nothing() -> AsyncIterator[str]:
        for text in ():
            yield text

    async def endpoint(request: Request) -> Response:
        return StreamingAnswer(nothing(), 201, {"x-it": "is"})

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    answer = await Client(app, "/", "Hi").run()
    assert (answer.status, answer.data, answer.over) == (201, b"", True)
    assert answer.headers["x-it"] == "is"
