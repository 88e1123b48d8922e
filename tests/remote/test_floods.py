"""What one client sends at once holds up nobody else, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_engine import BatchedEngine, ContextLengthExceeded, EngineBusy, InvalidRequest
from mlx_engine.remote.remote_engine import RemoteEngine
from mlx_engine.remote.serving import client_connection
from mlx_engine.remote.serving.host import EngineHost
from mlx_engine.remote.serving.round_robin import RoundRobin
from mlx_engine.remote.wire.frames import MAX_CLIENT_FRAME, WireError, framed
from mlx_engine.remote.wire.intake import MAX_VALUES, Step, messages_in
from mlx_engine.remote.wire.messages import Cancel, ErrorReply, Generate, encode
from mlx_engine.remote.wire.values import error_from_wire
from mlx_engine.requests import TokenIds
from tests.remote.hosting import PROMPT, Stranger, client, generate, hosted, until

pytestmark = pytest.mark.anyio

HOLD = 0.05  # seconds of processor time that the loop may spend without looking around


@pytest.fixture
async def host(tiny_path: Path) -> AsyncIterator[EngineHost]:
    async with BatchedEngine(tiny_path) as engine, hosted(engine) as host:
        yield host
        await until(lambda: not host.pending and not host.clients)


def asked(number: int = 1, **fields: Any) -> Generate:
    message = generate(number, 1)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def chat(messages: Any, tools: Any = None) -> Generate:
    return asked(prompt=None, chat=(messages, tools, {}, {}))


USER = {"role": "user", "content": "a"}


def unknown_options() -> bytes:
    return encode([asked(n, params={f"temperatura{n}": 1}) for n in range(65_000)])


def requests_of_nothing() -> bytes:
    return encode([asked(n, prompt="") for n in range(65_000)])


def many_requests() -> bytes:
    return encode([asked(n) for n in range(5_000)])


def cancels() -> bytes:
    return encode([*(generate(n) for n in range(1000)), *(Cancel(n) for n in range(60_000))])


def stop_strings() -> bytes:
    return encode([asked(params={"stop": ["abcdefghijklmnop"] * 400_000})])


def biases() -> bytes:
    return encode([asked(params={"logit_bias": dict.fromkeys(range(500_000), 1.0)})])


def messages() -> bytes:
    return encode([chat([USER] * 300_000)])


def tools() -> bytes:
    return encode([chat([USER], [{"a": 1}] * 1_500_000)])


def empty_lists() -> bytes:
    return encode([asked(params={"stop": [[]] * 8_000_000})])


def token_ids() -> bytes:
    return encode([asked(prompt=[150_000] * 1_600_000)])


def no_token_ids() -> bytes:
    return encode([asked(prompt=[5] * 1_000_000 + ["x"])])


FLOODS = [
    unknown_options,
    requests_of_nothing,
    many_requests,
    cancels,
    stop_strings,
    biases,
    messages,
    tools,
    empty_lists,
    token_ids,
    no_token_ids,
]


class Stopwatch:
    """How long the event loop has been at something at most, by its thread's processor time.

    By the wall clock other programs of the machine would count.
    """

    def __init__(self) -> None:
        self.longest = 0.0

    async def run(self) -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time.thread_time() - began)


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Stopwatch]:
    stopwatch = Stopwatch()
    task = asyncio.create_task(stopwatch.run())
    try:
        yield stopwatch
    finally:
        task.cancel()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Those of other tests' garbage would count as time here."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
async def test_a_flood_of_one_client_holds_up_no_others_tokens(
    host: EngineHost, flood: Any
) -> None:
    frame = framed(flood())
    assert len(frame) <= MAX_CLIENT_FRAME + 4
    async with client(host) as remote, Stranger.at(host, hello=True) as stranger:
        assert (await remote.generate(PROMPT, max_tokens=2)).tokens
        with no_collections():
            async with watched() as stopwatch:
                sending = asyncio.create_task(stranger.send(frame))
                deadline = time.monotonic() + 1
                while time.monotonic() < deadline:
                    assert (await remote.generate(PROMPT, max_tokens=2)).tokens
                    await asyncio.sleep(0.01)
                sending.cancel()
                await asyncio.wait({sending})
    assert stopwatch.longest < HOLD


@pytest.mark.parametrize("flood", [tools, empty_lists, biases], ids=lambda flood: flood.__name__)
async def test_what_is_refused_takes_no_memory_but_its_bytes(host: EngineHost, flood: Any) -> None:
    frame = framed(flood())
    async with Stranger.at(host, hello=True) as stranger:
        (one,) = host._connections
        tracemalloc.start()
        try:
            await stranger.send(frame)
            while not stranger.heard or not isinstance(stranger.heard[-1], ErrorReply):
                assert await stranger.hear()
            await until(lambda: one._steps is None)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 5 * len(frame)
    assert now < 2**20
    assert stranger.heard[-1].kind == "InvalidRequest"
    assert f"{MAX_VALUES:,} values" in stranger.heard[-1].message


async def test_a_client_is_not_listened_to_while_it_has_something_to_be_taken(
    host: EngineHost,
) -> None:
    async with Stranger.at(host, hello=True) as stranger:
        stranger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        (one,) = host._connections
        frame = framed(encode([asked(n, prompt="") for n in range(2000)]))
        sending = asyncio.create_task(stranger.send(frame * 200))
        most = 0
        for _ in range(300):
            most = max(most, len(one._frames))
            await asyncio.sleep(0.001)
        assert not sending.done()
        sending.cancel()
        await asyncio.wait({sending})
    assert most < 3 * len(frame) + 2**20


class Slices:
    """A worker that needs so many slices."""

    def __init__(self, name: str, count: int, log: list[str]) -> None:
        self.name, self.left, self.log = name, count, log

    def work(self, deadline: float) -> bool:
        assert deadline > asyncio.get_running_loop().time()
        self.log.append(self.name)
        self.left -= 1
        return self.left > 0


async def test_clients_take_turns() -> None:
    log: list[str] = []
    turns = RoundRobin()
    workers = [Slices("a", 5, log), Slices("b", 2, log), Slices("c", 3, log)]
    for worker in workers:
        turns.add(worker.work)
    assert log == ["a"], "the first one at once"
    await until(lambda: not any(worker.left > 0 for worker in workers))
    assert "".join(log) == "aabcabcaca"


async def test_who_has_gone_takes_no_turn() -> None:
    log: list[str] = []
    turns = RoundRobin()
    one, other = Slices("a", 1000, log), Slices("b", 2, log)
    turns.add(one.work)
    turns.add(other.work)
    turns.discard(one.work)
    await until(lambda: other.left == 0)
    assert log == ["a", "b", "b"]


async def test_requests_under_way_are_bounded_in_bytes(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "_MOST_BYTES", 200_000)
    async with client(host) as remote:
        long = remote.generate("a" * 90_000, max_tokens=1, ignore_eos=True)
        ends = await asyncio.gather(
            *(remote.generate("a " * 45_000, max_tokens=16_000) for _ in range(4)),
            long,
            return_exceptions=True,
        )
        busy = [end for end in ends if isinstance(end, EngineBusy)]
        assert 1 <= len(busy) <= 3
        assert all("under way already" in str(error) and error.retry_after for error in busy)
        assert (await remote.generate(PROMPT, max_tokens=1)).tokens
    await until(lambda: not host._connections)


# ── who says nothing ────────────────────────────────────────────────────────────────────────


async def test_the_silent_keep_nobody_out_and_are_told_why(
    host: EngineHost, caplog: pytest.LogCaptureFixture
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        mutes = [await stack.enter_async_context(Stranger.at(host)) for _ in range(200)]
        async with client(host) as remote:
            assert (await remote.generate(PROMPT, max_tokens=1)).tokens
            reason = await mutes[0].refusal()
            assert "64 others have connected since and have not said who they are" in reason
            assert len(host._connections) <= 2 * 64 + 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "one line"


async def test_a_client_that_is_evicted_raises_why(host: EngineHost) -> None:
    async with Stranger.at(host) as stranger:
        await until(lambda: host._connections)
        (one,) = host._connections
        one.evict("others want in")
        with contextlib.suppress(ConnectionError):
            await stranger.send(framed(RemoteEngine("x")._greeting()(None)))
        assert await stranger.refusal() == "others want in"


async def test_who_has_not_said_who_it_is_is_kept_in_few_bytes(host: EngineHost) -> None:
    async with Stranger.at(host) as stranger:
        await stranger.send((5000).to_bytes(4, "big"))
        assert "a frame of 5000 bytes is announced; 4096 is the most" in await stranger.refusal()


# ── a frame ─────────────────────────────────────────────────────────────────────────────────


def said(*messages: Any, context_length: int | None = None) -> list[Any]:
    steps = messages_in(encode(list(messages)), context_length)
    return [step.message for step in steps if step.message is not None]


def test_large_requests_are_what_small_ones_are() -> None:
    ids = [0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**31, 2**32, 2**63] * 20_000
    prompts: list[Any] = [ids, ids[:9000], "x" * 100_000, "é" * 70_000, [1, 2], "a"]
    requests = [asked(n, prompt=prompt) for n, prompt in enumerate(prompts)]
    requests.append(
        chat([{"role": "user", "content": "x" * 40_000, "n": [1.5, None, True, -7]}] * 9)
    )
    requests.append(asked(77, params={"stop": ["y" * 70_000, "z" * 300], "seed": 2**64 - 1}))
    assert said(*requests, Cancel(5)) == [*requests, Cancel(5)]
    for request in requests:
        assert said(request) == [request]
    (large, *_) = said(requests[0])
    assert isinstance(large.prompt, TokenIds), "each of which was looked at already"


def test_a_step_is_short_whatever_the_frame_is() -> None:
    for flood in FLOODS:
        frame, longest = flood(), 0.0
        with no_collections():
            steps = messages_in(frame, None)
            while True:
                began = time.thread_time()
                step: Step | None = next(steps, None)
                longest = max(longest, time.thread_time() - began)
                if step is None:
                    break
        assert longest < HOLD, flood.__name__


@pytest.mark.parametrize(
    ("request_", "option"),
    [
        (chat([USER] * 40_000), "messages"),
        (chat([USER], [{"a": {}}] * 40_000), "messages"),
        (asked(params={"stop": ["a"] * 140_000}), "params"),
        (asked(params={"logit_bias": {n: [n] for n in range(40_000)}}), "params"),
        (asked(prefill={"x": [[]] * 40_000}), "prefill"),
        (asked(prompt=["a"] * 40_000), "prompt"),
        (asked(prompt=[[1] * 10] * 40_000), "prompt"),
        (asked(prompt=[1] * 40_000 + [-1]), "prompt"),
    ],
)
def test_a_request_with_too_many_values_is_refused_by_its_number(
    request_: Generate, option: str
) -> None:
    request_.number = 42
    (refusal,) = said(request_)
    assert isinstance(refusal, ErrorReply)
    assert refusal.number == 42
    error = error_from_wire(refusal)
    assert isinstance(error, InvalidRequest)
    assert error.option == option


def test_token_ids_that_cannot_fit_are_refused_by_their_count() -> None:
    (refusal,) = said(asked(prompt=[7] * 100_000), context_length=99_999)
    error = error_from_wire(refusal)
    assert isinstance(error, ContextLengthExceeded)
    assert error.prompt_tokens == 100_000
    assert said(asked(prompt=[7] * 100_000), context_length=100_000)


@pytest.mark.parametrize(
    "payload",
    [
        encode([["cancel", "x" * 40_000]]),
        encode([["x" * 40_000]]),
        encode(["x" * 40_000]),
        encode([list(range(40_000))]),
        encode([["generate", "x" * 40_000, None]]),
        encode([["generate", 1]] * 20_000),
        encode([["generate", 1, "x" * 40_000]]),
        encode([asked()] * 2)[:-1] + b"x" * 40_000,
        msgspec.msgpack.encode({"a": "x" * 40_000}),
        b"\x91" * 100_000,
        b"\x91\xc1" + b"x" * 40_000,
        b"\xdd\x00\x00\x00\x01\x92",
        b"",
    ],
)
def test_what_no_client_says_makes_no_sense_when_it_is_large_too(payload: bytes) -> None:
    with pytest.raises(WireError):
        list(messages_in(payload, None))
