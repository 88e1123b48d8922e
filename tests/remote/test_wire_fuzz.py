"""Whatever comes over the socket, it costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_engine import BatchedEngine, InvalidRequest
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.wire.frames import MAX_CLIENT_FRAME, MAX_FRAME, framed
from mlx_engine.remote.wire.messages import Cancel, Generate, Hello, Shutdown, encode
from tests.remote.hosting import PROMPT, Stranger, client, generate, hosted
from tests.waiting import until

pytestmark = pytest.mark.anyio

HELLO = framed(encode([Hello()]))
SEED = 11
ROUNDS = 400  # strangers, some seconds


@pytest.fixture
async def host(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[EngineHost]:
    """A host; after the test nobody is left, and nothing has gone wrong in its event loop."""
    wrong: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    async with BatchedEngine(tiny_path) as engine, hosted(engine) as host:
        yield host
        await until(lambda: not host.pending and not host.clients and not host._connections)
        stats = engine.stats()
        assert stats.running == stats.waiting == 0
    assert wrong == []
    assert {(r.name, r.levelno) for r in caplog.records} <= {("mlx_engine.host", logging.WARNING)}
    assert all("\n" not in r.message and len(r.message) < 400 for r in caplog.records)


# ── what they say ───────────────────────────────────────────────────────────────────────────

SHAPES: list[object] = [
    None,
    7,
    "hello",
    {},
    [],
    [[]],
    [None],
    [[None]],
    [["hello"]],
    [["hello", "mlx_engine"]],
    [["hello", "mlx_engine", "1"]],
    [["hello", "mlx_engine", True]],
    [["hello", "someone", 1]],
    [["hello", "mlx_engine", 10**18]],
    [["generate"]],
    [["generate", 1, 2, 3]],
    [["generate", 1, None, None, {}, 0, None, None, True, True]],
    [["generate", 1, "x", [[], None, {}, {}], {}, 0, None, None, True, True]],
    [["generate", 1, "x", None, {"max_tokens": -1}, 0, "fast", None, True, True]],
    [["generate", 1, "x", None, {"no": 1, "stop": {"a": 1}}, 2**63, {"draft": 1}, "x", True, True]],
    [["generate", 1, None, [[{"role": []}], 3, {}, {}], {}, 0, None, None, True, True]],
    [
        ["generate", 1, None, [[{"role": "user", "content": "x"}], [{}], {"a": {}}, {"b": 1}], {}]
        + [0] * 5
    ],
    [["generate", -1, [-1], None, {"seed": 2**64 - 1}, 0, "default", None, True, True]],
    [["ask"], ["ask", 1], ["ask", 1, "x", None, "guess"]],
    [["ask", 1, None, None, "count_tokens"], ["ask", 1, [-1], None, "decode"]],
    [["ask", 2, "x", None, "decode"], ["ask", 3, None, [[], 1, {}, {"x": 1}], "render_chat"]],
    [["cancel"], ["cancel", "x"]],
    [["cancel", 99]],
    [["cachefile", 1, "delete", "/"]],
    [["cachefile", 1, "load", "\0"]],
    [["cachefile", 1, "save", ""]],
    [["cachefile", 1, "load", "/dev/null/x" * 1000]],
    [["shutdown", -5]],
    [["shutdown", float("inf")]],
    [["shutdown", "now"]],
    [["welcome", True, 1, 1, None], ["stopped", None], ["heartbeat", 1, "idle", 0, 0, None]],
]


def some_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 3000))


def a_frame_of_bytes(rng: random.Random) -> bytes:
    return framed(some_bytes(rng))


def a_shape(rng: random.Random) -> bytes:
    return framed(msgspec.msgpack.encode(rng.choice(SHAPES)))


def a_truncated_frame(rng: random.Random) -> bytes:
    frame = framed(encode([generate(1, stream=True)]))
    return frame[: rng.randrange(1, len(frame))]


def a_mutated_frame(rng: random.Random) -> bytes:
    payload = bytearray(encode([generate(rng.randrange(5), 50, stream=True)]))
    for _ in range(rng.randrange(1, 5)):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return framed(bytes(payload))


def a_huge_length(rng: random.Random) -> bytes:
    return rng.randrange(MAX_FRAME + 1, 2**32).to_bytes(4, "big") + some_bytes(rng)


def deep_nesting(rng: random.Random) -> bytes:
    start = rng.choice([b"", b"\x91\x9a\xa8generate\x01\xc0"])
    return framed(start + rng.choice([b"\x91", b"\x81\xa1a"]) * 30000)


def the_same_number_again(rng: random.Random) -> bytes:
    return framed(encode([generate(3, 5) for _ in range(500)])) * 3


def another_version(rng: random.Random) -> bytes:
    return framed(encode([Hello(version=rng.randrange(2, 2**40))]))


def a_cancelled_crowd(rng: random.Random) -> bytes:
    crowd: list[Any] = [generate(n, 5000, stream=True) for n in range(8)]
    return framed(encode([*crowd, *(Cancel(n) for n in range(-3, 20)), Shutdown(0.01)]))


KINDS: list[Callable[[random.Random], bytes]] = [
    some_bytes,
    a_frame_of_bytes,
    a_shape,
    a_shape,
    a_truncated_frame,
    a_mutated_frame,
    a_mutated_frame,
    a_huge_length,
    deep_nesting,
    the_same_number_again,
    another_version,
    a_cancelled_crowd,
]


async def babble(host: EngineHost, rng: random.Random) -> None:
    """Connect, perhaps say hello, say something, perhaps listen, and go."""
    with contextlib.suppress(ConnectionError):
        async with Stranger.at(host) as stranger:
            if rng.random() < 0.7:
                await stranger.send(HELLO)
            for _ in range(rng.randrange(1, 3)):
                await stranger.send(rng.choice(KINDS)(rng))
            if rng.random() < 0.7:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.06):
                        while await stranger.hear():
                            pass


async def test_nothing_that_is_said_harms_a_client_that_behaves(host: EngineHost) -> None:
    rng = random.Random(SEED)
    expected = (await host.engine.generate(PROMPT, max_tokens=60, ignore_eos=True)).tokens
    async with client(host) as remote:
        answers, over = 0, False

        async def behave() -> None:
            nonlocal answers
            while not over:
                async with remote.stream_generate(PROMPT, max_tokens=60, ignore_eos=True) as stream:
                    tokens = [token async for chunk in stream for token in chunk.tokens]
                assert tuple(tokens) == stream.result.tokens == expected
                answers += 1

        behaving = asyncio.create_task(behave())
        for _ in range(ROUNDS // 4):
            await asyncio.gather(*(babble(host, rng) for _ in range(4)))
        await until(lambda: answers > 3 or behaving.done())
        over = True
        await behaving
        assert answers > 3
        assert host.clients >= 1


# ── each of them ────────────────────────────────────────────────────────────────────────────


async def test_a_length_is_believed_only_as_bytes_arrive(host: EngineHost) -> None:
    announced = 8 * 2**20
    assert announced <= MAX_CLIENT_FRAME
    tracemalloc.start()
    try:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(11):
                stranger = await stack.enter_async_context(Stranger.at(host, hello=True))
                await stranger.send(announced.to_bytes(4, "big") + b"\x91" * 5000)
            await until(lambda: sum(len(g._frames) for g in host._connections) > 50_000)
            assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
            async with client(host) as remote:
                assert (await remote.generate(PROMPT, max_tokens=1)).tokens
    finally:
        tracemalloc.stop()


async def test_a_length_above_the_limit_ends_the_connection_at_once(host: EngineHost) -> None:
    for hello in (False, True):
        async with Stranger.at(host, hello=hello) as stranger:
            await stranger.send((2**30).to_bytes(4, "big"))
            assert f"a frame of {2**30} bytes is announced" in await stranger.refusal()


@pytest.mark.parametrize("inner", [b"\x91", b"\x81\xa1a"])
async def test_deep_nesting_is_refused(host: EngineHost, inner: bytes) -> None:
    for hello in (False, True):
        async with Stranger.at(host, hello=hello) as stranger:
            await stranger.send(framed(inner * 100_000))
            assert await stranger.refusal()


async def test_a_frame_of_more_messages_than_anybody_sends_is_refused(host: EngineHost) -> None:
    async with Stranger.at(host, hello=True) as stranger:
        await stranger.send(framed(encode([Cancel(1)] * 65_536)))
        assert "too many messages" in await stranger.refusal()


async def test_tiny_requests_with_the_same_number_are_one_at_most(host: EngineHost) -> None:
    before = host.engine.stats()
    async with Stranger.at(host, hello=True) as stranger:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                await stranger.say(*(generate(7, 1000) for _ in range(50)))
        with contextlib.suppress(ConnectionError):
            await stranger.end()
    await until(lambda: not host.pending)
    after = host.engine.stats()
    assert after.cancelled + after.finished - before.cancelled - before.finished <= 1


async def test_a_frame_may_come_byte_by_byte(host: EngineHost) -> None:
    async with Stranger.at(host) as stranger:
        for byte in HELLO + framed(encode([generate(1, 3)])):
            await stranger.send(bytes([byte]))
            await asyncio.sleep(0)
        while len(stranger.heard) < 2:
            assert await stranger.hear()
        assert stranger.heard[1].result.usage.completion_tokens == 3  # type: ignore[union-attr]


async def test_those_who_only_connect_do_not_keep_others_out(host: EngineHost) -> None:
    async with contextlib.AsyncExitStack() as stack:
        mutes = [await stack.enter_async_context(Stranger.at(host)) for _ in range(90)]
        assert "64 others have connected since" in await mutes[0].refusal(), "there are limits"
        assert host.clients == 0
        for mute in mutes:
            mute.sock.close()
        async with client(host) as remote:
            assert (await remote.generate(PROMPT, max_tokens=1)).tokens


async def test_a_request_that_is_too_long_for_a_frame_is_an_error_not_a_silence(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteEngine, "frame_limit", 5000)
    async with client(host) as remote:
        with pytest.raises(InvalidRequest, match=r"^prompt: .*5000"):
            await remote.generate("x" * 6000)
        assert (await remote.generate(PROMPT, max_tokens=1)).tokens


async def test_every_shape_is_answered_or_refused(host: EngineHost) -> None:
    for shape in SHAPES:
        for hello in (False, True):
            async with Stranger.at(host, hello=hello) as stranger:
                await stranger.send(framed(msgspec.msgpack.encode(shape)))
                await stranger.say(Shutdown(0))
                assert await stranger.end(), shape


def test_the_requests_here_are_what_clients_send() -> None:
    assert isinstance(generate(1), Generate)
    assert RemoteEngine("x")._greeting()(None) == encode([Hello()])
