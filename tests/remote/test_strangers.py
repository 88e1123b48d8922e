"""Who connects to a host and does not behave, or is not wanted: nobody else notices."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from mlx_engine import (
    BaseEngine,
    EngineBusy,
    EngineDead,
    InvalidRequest,
    SamplingParams,
    SimpleEngine,
)
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving import client_connection
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.frames import framed
from mlx_engine.remote.wire.messages import (
    VERSION,
    CacheFile,
    CacheFileDone,
    Configure,
    Done,
    Draining,
    Hello,
    Shutdown,
    Stopped,
    encode,
)
from mlx_engine.requests import GenerationRequest, TextPrompt
from tests.remote.hosting import (
    PROMPT,
    Stranger,
    client,
    endless,
    free,
    generate,
    hosted,
    running,
)
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio
LOG = "mlx_engine.host"


async def test_who_says_nothing_is_sent_away(
    engine: BaseEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with hosted(engine, hello_timeout=1) as host, client(host) as remote:
        async with Stranger.at(host) as stranger:
            assert "nothing was said within 1 s" in await stranger.refusal()
        assert (await remote.generate(PROMPT, max_tokens=1)).tokens
    assert [(r.name, r.levelno) for r in caplog.records] == [(LOG, logging.WARNING)]


async def test_another_version_is_told_who_has_to_upgrade(host: EngineHost) -> None:
    newer = [["hello", "mlx_engine", VERSION + 1, {"compression": True}], ["something", "new"]]
    for version, said in ((VERSION + 1, "upgrade the host"), (VERSION - 1, "upgrade the client")):
        newer[0][2] = version  # type: ignore[index]
        async with Stranger.at(host) as stranger:
            await stranger.send(framed(encode(newer)))
            reason = await stranger.refusal()
        assert f"speaks version {VERSION}, the client speaks {version}: {said}" in reason


async def test_a_client_of_another_version_raises_that_at_its_start(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = VERSION + 1
    monkeypatch.setattr(
        RemoteEngine, "_greeting", lambda self: lambda _: encode([Hello(version=newer)])
    )
    with pytest.raises(EngineDead, match=f"the client speaks {newer}: upgrade the host"):
        await RemoteEngine(host.path).start()


async def test_no_more_clients_than_allowed_until_one_leaves(engine: BaseEngine) -> None:
    async with hosted(engine, max_clients=2) as host, client(host):
        async with client(host) as second:
            with pytest.raises(EngineDead, match="2 clients already"):
                await RemoteEngine(host.path).start()
            assert (await second.generate(PROMPT, max_tokens=1)).tokens
        await until(lambda: host.clients == 1)
        async with client(host) as third:
            assert (await third.generate(PROMPT, max_tokens=1)).tokens


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Hello()], "a client does not say Hello here"),
        ([Configure("simple", "x", {}, [], 1.0)], "a client does not say Configure here"),
        ([generate(1)], "request 1 is under way already"),
        ([CacheFile(1, "save", "/none")], "request 1 is under way already"),
        ([Done.__struct_fields__], "no messages"),
    ],
)
async def test_what_a_client_does_not_say_costs_it_its_connection_and_requests(
    host: EngineHost,
    remote: RemoteEngine,
    messages: list[object],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Stranger.at(host, hello=True) as stranger:
        await stranger.say(generate(1))
        await running(host)
        await stranger.say(*messages)
        assert reason in await stranger.refusal()
    await free(host)
    assert host.clients == 1
    assert [record.name for record in caplog.records] == [LOG]
    assert reason in caplog.text
    assert (await remote.generate(PROMPT, max_tokens=2)).tokens


async def test_a_client_that_does_not_read_is_dropped_and_slows_nobody(
    host: EngineHost,
    remote: RemoteEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(client_connection, "MAX_UNSENT", 50_000)
    others = set(host._connections)
    async with Stranger.at(host, hello=True) as stranger:
        (its_connection,) = host._connections - others
        its: socket.socket = its_connection._transport.get_extra_info("socket")
        # The system keeps less for them than it would.
        stranger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await stranger.say(*(generate(n, stream=True) for n in range(1, 5)))
        await until(lambda: host.clients == 1, "it is dropped")
        await free(host)
    assert "does not read" in caplog.text
    assert (await remote.generate(PROMPT, max_tokens=2)).tokens


async def test_a_stopped_client_is_not_told_more_and_more_heartbeats(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "_MAX_UNSENT_BEFORE_BEAT", 5000)
    async with Stranger.at(host, hello=True):
        (one,) = host._connections
        while not (size := one._transport.get_write_buffer_size()) > 5000:
            one.beat(host._heartbeats.heartbeat())
            await asyncio.sleep(0)
        for _ in range(1000):
            one.beat(host._heartbeats.heartbeat())
        await turns()
        assert one._transport.get_write_buffer_size() == size
        assert host.clients == 1


async def test_a_cancelled_save_is_answered(engine: BaseEngine, tmp_path: Path) -> None:
    async with (
        hosted(engine, cache_folder=tmp_path) as host,
        Stranger.at(host, hello=True) as stranger,
    ):
        await stranger.say(generate(1), CacheFile(2, "save", "cache"))
        await running(host, 2)
        await stranger.say(Shutdown(0))
        *_, stopped = told = await stranger.end()
    assert isinstance(stopped, Stopped)
    assert {type(m) for m in told if getattr(m, "number", 0) == 2} <= {CacheFileDone}


async def test_clients_hear_that_the_host_leaves_before_they_hear_that_it_has(
    host: EngineHost,
) -> None:
    async with Stranger.at(host, hello=True) as stranger, Stranger.at(host) as mute:
        await until(lambda: len(host._connections) == 2)
        shutdown = asyncio.create_task(host.shutdown(0))
        _, leaving, stopped = await stranger.end()
        assert isinstance(leaving, Draining)
        assert isinstance(stopped, Stopped)
        assert await mute.refusal() == "the host was asked to end"
    await shutdown


async def test_who_comes_in_at_the_last_moment_is_sent_away_too(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for delay in range(4):
        async with (
            SimpleEngine(tiny_path) as engine,
            hosted(engine) as host,
            Stranger.at(host) as one,
            Stranger.at(host) as two,
        ):
            for _ in range(delay):
                await asyncio.sleep(0)
            shutdown = asyncio.create_task(host.shutdown(0))
            assert len(await one.end() + await two.end()) <= 2
            await shutdown
            assert not host._connections
    assert {record.name for record in caplog.records} <= {LOG}


async def test_what_a_client_says_reaches_no_other_client(host: EngineHost) -> None:
    """Names show in texts, and a client has so many requests at once."""
    user = [{"role": "user", "content": "hi"}]
    async with client(host) as remote, client(host) as other:
        with pytest.raises(InvalidRequest, match=r"^chat_template_kwargs: 'chat_template' is set"):
            await remote.chat(user, chat_template_kwargs={"chat_template": "{{ 1 }}"})
        ask = GenerationRequest(TextPrompt("a"), SamplingParams(max_tokens=1))
        result = await other.submit(ask, None, "n" * 100_000).run(None)
        assert result.tokens
        assert len(str(host.engine.stats())) < 5000
        many = [endless(remote) for _ in range(1100)]
        await until(lambda: sum(task.done() for task in many) == 76, "so many are refused")
        for task in many:
            task.cancel()
        ends = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(end, EngineBusy) for end in ends) == 76
        assert (await other.generate("a", max_tokens=1)).tokens
