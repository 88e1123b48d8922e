"""What clients do to their connections, on real sockets: too much, or too little."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mlx_engine.cli import http_server
from mlx_engine.server import LOOPBACK, create_app
from mlx_engine.testing import FakeEngine, Gate
from tests.server.asgi import CHAT
from tests.server.leaving import free
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine, **options: Any
) -> AsyncIterator[tuple[http_server.HttpServer, int]]:
    """A server, and its port."""
    server = http_server.HttpServer(create_app(engine, **options))
    with http_server.bound("127.0.0.1", 0) as door:
        task = asyncio.create_task(server.serve(sockets=[door]))
        await server.listening(task)
        async with asyncio.timeout(PATIENCE):
            yield server, door.getsockname()[1]
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def listening(engine: FakeEngine, **options: Any) -> AsyncIterator[int]:
    """A server's port."""
    async with serving(engine, **options) as (_, port):
        yield port


def request(*, path: str = CHAT, headers: str = "", stream: bool = False) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": stream})
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    )
    return (head + body).encode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("behind", [b"\r\n", request()], ids=["a line's end", "another request"])
async def test_who_leaves_is_heard_behind_whatever_was_sent(
    behind: bytes, at_once: bool, stream: bool
) -> None:
    """uvicorn stops reading when something comes behind a request, and then hears nothing more."""
    gate = Gate()
    async with FakeEngine([gate, "Hi."]) as engine, listening(engine) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(stream=stream) + (behind if at_once else b""))
        await gate.reached()
        if not at_once:
            writer.write(behind)
            await writer.drain()
            for _ in range(20):  # that it is read; whenever it is, the outcome is the same
                await asyncio.sleep(0.005)
        writer.close()
        await until(lambda: engine.requests[0].outcome == "cancelled")
        await free(engine)
        assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://localhost/v1/chat/completions", 200),
        ("HTTP://127.0.0.1:8080//chat/completions?beta=true", 200),
        ("http://localhost/", 405),
        ("https://localhost", 405),
        ("http://localhost/nowhere", 404),
        ("http://evil.example/v1/chat/completions", 403),
        ("http://[/v1/chat/completions", 403),
        ("http://", 405),
        ("ftp://localhost/v1/chat/completions", 404),
    ],
)
async def test_whole_urls_are_addresses_too(url: str, status: int) -> None:
    """As clients send them that take the server for a proxy; their host is what counts."""
    async with (
        FakeEngine("Hi.") as engine,
        listening(engine, hosts=LOOPBACK) as port,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(path=url, headers="connection: close\r\n"))
        assert int((await reader.read()).split()[1]) == status
        writer.close()


async def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    async with FakeEngine("Hi.") as engine, listening(engine) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        many = 2 * http_server._AHEAD // len(request())
        writer.write(request(path="/nowhere") + request() * many)
        writer.write(request(headers="connection: close\r\n"))
        said = await reader.read()
        writer.close()
        assert said.startswith(b"HTTP/1.1 404")
        assert said.count(b"HTTP/1.1 200") == many + 1


async def test_who_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are no streams, and pages, have no other limit."""
    monkeypatch.setattr(http_server, "_PATIENCE", 0.2)
    async with FakeEngine("x" * 300_000) as engine, listening(engine) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            while True:  # of which none is read; the last ones are not even taken
                writer.write(request())
                await writer.drain()
        assert engine.requests
        await free(engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(headers="connection: close\r\n"))
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_who_leaves_is_heard_before_all_is_read() -> None:
    """Half a close is one, too. To close a connection nicely would wait for what is not read."""
    async with FakeEngine("x" * 2**24) as engine, serving(engine) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(stream=True))
        await reader.read(1)
        writer.write_eof()
        await until(lambda: not server.server_state.tasks)
        assert not server.server_state.connections
        writer.close()


async def test_a_connection_is_closed_though_its_last_answer_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_HEAD_SECONDS", 0.1)
    monkeypatch.setattr(http_server, "_PATIENCE", 0.4)
    async with FakeEngine("x" * 2**24) as engine, serving(engine) as (server, port):
        monkeypatch.setattr(http_server._Connection, "pause_writing", lambda self: None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request())
        await reader.read(1)
        await until(lambda: not server.server_state.connections)
        writer.close()


async def test_the_end_waits_for_nobody_who_sends_or_reads_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeEngine("x" * 2**24) as engine, serving(engine) as (server, port):
        writers = []
        for sent in (request()[:-5], request(stream=True), b"POST /"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writers.append(writer)
        await until(lambda: len(server.server_state.tasks) == 2 and engine.requests)
        server.should_exit = True
        server.cut()
        await until(lambda: not server.server_state.tasks)
        for writer in writers:
            writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_nonsense_behind_an_answer_closes_the_connection_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = "POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    async with FakeEngine("Hi.") as engine, listening(engine) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"1\r\nx\r\n")
        said = await reader.read(1)
        writer.write(b"no chunk\r\n")
        said += await reader.read()
        writer.close()
        assert said.startswith(b"HTTP/1.1 404")
        assert said.count(b"HTTP/1.1") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_another_protocol_that_is_offered_is_not_taken_nor_talked_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Java's client offers HTTP/2 with each request."""
    offer = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    async with FakeEngine("Hi.") as engine, listening(engine) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(headers=offer) + request(headers="connection: close\r\n"))
        assert (await reader.read()).count(b"HTTP/1.1 200") == 2
        writer.close()
    assert "pgrade" not in caplog.text
