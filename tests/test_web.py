"""The guide's web back end, under a real server, with clients that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mlx_engine import BatchedEngine, EngineStats
from mlx_engine.cli import guide
from tests.conftest import other_tasks
from tests.guard import GUARD, Gate
from tests.waiting import until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
HELLO = [{"role": "user", "content": "Hello"}]
_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def guide_app() -> str:
    found = _BLOCK.findall(guide.text("deploying"))
    assert len(found) == 1, "the topic has one program"
    return str(found[0])


class Reply:
    """What a client has been told so far."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def head(self) -> Reply:
        self.status = int((await self._reader.readline()).split()[1])
        while line := (await self._reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        return self

    async def events(self) -> AsyncIterator[str]:
        async for line in self._reader:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").decode().strip()

    async def body(self) -> Any:
        return json.loads(await self._reader.readexactly(int(self.headers["content-length"])))

    def vanish(self) -> None:
        """As a client that has crashed: no last word."""
        self._writer.transport.abort()


class Site:
    """The application of the guide, served."""

    def __init__(self, port: int, names: dict[str, Any]) -> None:
        self.port = port
        self._names = names

    def stats(self) -> EngineStats:
        stats: EngineStats = self._names["engine"].stats()
        return stats

    async def until(self, holds: Callable[[EngineStats], bool]) -> None:
        await until(lambda: holds(self.stats()))

    @contextlib.asynccontextmanager
    async def post(self, body: object, path: str = "/v1/chat/completions") -> AsyncIterator[Reply]:
        """Ask; ``head`` of what is given waits until the first of the answer is there."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            yield Reply(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def answer(self, messages: object = HELLO, **options: object) -> list[dict[str, Any]]:
        """All events of an answer but the last one, which says that it is over."""
        async with self.post({"messages": messages, **options}) as reply:
            assert (await reply.head()).status == 200
            assert reply.headers["content-type"].startswith("text/event-stream")
            events = [event async for event in reply.events()]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


@contextlib.asynccontextmanager
async def served(tiny_path: Path, **options: Any) -> AsyncIterator[Site]:
    """The guide's application on a port of its own.

    Args:
        options: for another engine than the guide's.
    """
    names: dict[str, Any] = {"__name__": "app"}
    app = guide_app().replace('"model"', repr(str(tiny_path)))
    exec(compile(app, "deploying.md", "exec"), names)
    if options:
        names["engine"] = BatchedEngine(tiny_path, **options)
    names["OPTIONS"] += ("ignore_eos",)  # so that answers are as long as the tests want them
    door = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(names["app"], http="h11", ws="none", lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[door]))
    try:
        while not server.started:
            assert not serving.done(), "the server did not start"
            await asyncio.sleep(0.001)
        yield Site(door.getsockname()[1], names)
    finally:
        server.should_exit = True
        await serving
        door.close()
    assert names["engine"].state.value == "stopped"
    assert not other_tasks()


@pytest.fixture
async def site(tiny_path: Path) -> AsyncIterator[Site]:
    async with served(tiny_path) as site:
        yield site


async def test_an_answer_is_streamed_as_the_engine_gives_it(site: Site, tiny_path: Path) -> None:
    events = await site.answer(max_tokens=12, ignore_eos=True)
    assert len(events) > 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [
        "length"
    ]
    async with BatchedEngine(tiny_path) as alone:
        result = await alone.chat(HELLO, max_tokens=12, ignore_eos=True)
    assert "".join(choice["delta"].get("content", "") for choice in choices) == result.text


async def test_the_first_event_is_there_long_before_the_last_one(
    site: Site, gate: MakeGate
) -> None:
    stop = gate("model", 10)
    async with site.post({"messages": HELLO, "max_tokens": 40, "ignore_eos": True}) as reply:
        events = (await reply.head()).events()
        assert json.loads(await anext(events))["choices"][0]["finish_reason"] is None
        await stop.reached()
        assert site.stats().running == 1
        stop.go()
        assert [event async for event in events][-1] == "[DONE]"


async def test_a_client_that_vanishes_while_it_reads_frees_the_engine(site: Site) -> None:
    wanted = 10_000  # tokens; many seconds
    async with site.post({"messages": HELLO, "max_tokens": wanted, "ignore_eos": True}) as reply:
        await anext((await reply.head()).events())
        reply.vanish()
        await site.until(lambda stats: stats.cancelled == 1)
    stats = site.stats()
    assert stats.running == stats.waiting == stats.finished == 0
    assert stats.completion_tokens < wanted / 2
    assert await site.answer(max_tokens=3)


async def test_a_client_that_vanishes_during_its_long_prompt_frees_the_engine(
    tiny_path: Path, gate: MakeGate
) -> None:
    long = [{"role": "user", "content": "x" * 15_000}]
    async with served(tiny_path, prefill_step_size=8, prompt_cache_bytes=0) as site:
        inside = gate("model", 3)
        async with site.post({"messages": long, "max_tokens": 8}) as reply:
            await inside.reached()
            reply.vanish()
            inside.go()
            await site.until(lambda stats: stats.cancelled == 1)
        assert inside.calls < 1000, "of nearly 2,000 chunks"
        assert site.stats().completion_tokens == 0
        assert await site.answer(max_tokens=3)


async def test_a_client_that_vanishes_from_the_queue_leaves_it(
    tiny_path: Path, gate: MakeGate
) -> None:
    async with served(tiny_path, max_batch_size=1) as site:
        inside = gate("model", 3)
        async with site.post({"messages": HELLO, "max_tokens": 5}) as first:
            await inside.reached()
            async with site.post({"messages": HELLO}) as second:
                await site.until(lambda stats: stats.waiting == 1)
                second.vanish()
                await site.until(lambda stats: stats.waiting == 0)
            assert site.stats().cancelled == 1
            inside.go()
            assert (await first.head()).status == 200
            assert [event async for event in first.events()][-1] == "[DONE]"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "context"),
        ({}, "messages"),
        ([], "body"),
        (b"{", "Expecting"),
        (b"\xff", "utf-8"),
    ],
    ids=["range", "type", "message", "too-long", "none", "list", "no-json", "no-text"],
)
async def test_bad_input_is_400_and_says_what_is_wrong(
    site: Site, body: object, named: str
) -> None:
    async with site.post(body) as reply:
        assert (await reply.head()).status == 400
        assert named in (await reply.body())["error"]
    assert await site.answer(max_tokens=1)


async def test_clients_cannot_have_functions_imported(site: Site) -> None:
    assert await site.answer(max_tokens=1, logits_processors=["antigravity:fly"])


async def test_a_full_queue_is_503_and_says_when_to_come_again(
    tiny_path: Path, gate: MakeGate
) -> None:
    async with served(tiny_path, max_batch_size=1, queue_limit=1) as site:
        inside = gate("model", 3)
        ask = {"messages": HELLO, "max_tokens": 5}
        async with site.post(ask) as first:
            await inside.reached()
            async with site.post(ask) as second:
                await site.until(lambda stats: stats.waiting == 1)
                async with site.post(ask) as third:
                    assert (await third.head()).status == 503
                    assert int(third.headers["retry-after"]) >= 1
                    assert "queue_limit=1" in (await third.body())["error"]
                inside.go()
                for reply in first, second:
                    assert (await reply.head()).status == 200
                    assert [event async for event in reply.events()][-1] == "[DONE]"


async def test_a_request_that_fails_in_mlx_is_500(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "model":
            monkeypatch.undo()  # it is the only one
            raise RuntimeError("no memory left")

    monkeypatch.setattr(GUARD, "hook", fail)
    async with site.post({"messages": HELLO}) as reply:
        assert (await reply.head()).status == 500
        assert "no memory left" in (await reply.body())["error"]
    assert await site.answer(max_tokens=1)


async def test_an_engine_that_is_being_stopped_is_503(site: Site) -> None:
    await site._names["engine"].stop()
    async with site.post({"messages": HELLO}) as reply:
        assert (await reply.head()).status == 503
        assert int(reply.headers["retry-after"]) >= 1
