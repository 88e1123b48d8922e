"""A link through a Ray actor, to a child that sends frames back; and one to a real core."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_engine import EngineDead, MLXEngineError
from mlx_engine.remote.links import ray_link, relay
from mlx_engine.remote.links.link import Ending
from mlx_engine.remote.links.ray_link import RayLink
from mlx_engine.remote.links.relay import (
    BATCH_BYTES,
    GATHER_FRAMES,
    GATHER_TIME,
    Gatherer,
    Relay,
    batches,
)
from mlx_engine.remote.ray_engine import RayEngine
from mlx_engine.remote.wire.frames import FrameSplitter, framed
from mlx_engine.testing.safety import stepped_loop
from tests.conftest import ROOT
from tests.processes import is_alive, is_stopped
from tests.remote.conftest import RayCluster
from tests.remote.echo import EchoLink
from tests.waiting import PATIENCE, PROMPTLY, expire, until

pytestmark = pytest.mark.anyio
on_ray = pytest.mark.ray


class Echo(RayLink):
    """A link to a child that sends frames back; keeps what it gets."""

    hosted = EchoLink

    def __init__(self, node: str = "node_a", name: str = "echo", **options: Any) -> None:
        super().__init__(name, num_cpus=0, resources={node: 1}, **options)
        self._received: asyncio.Queue[bytes] = asyncio.Queue()
        self.on_frame = self._received.put_nowait

    async def frames(self, count: int) -> list[bytes]:
        async with asyncio.timeout(PATIENCE):
            return [await self._received.get() for _ in range(count)]

    async def ask(self, frame: bytes) -> bytes:
        self.send(frame)
        return (await self.frames(1))[0]

    async def pids(self) -> list[int]:
        """The actor's process and its child."""
        assert self.place is not None
        return [self.place.pid, int(await self.ask(b"!pid"))]


@contextlib.asynccontextmanager
async def opened(node: str = "node_a", **options: Any) -> AsyncIterator[Echo]:
    link = Echo(node, **options)
    try:
        async with asyncio.timeout(PATIENCE):
            await link.open()
        yield link
    finally:
        link.kill()
        await soon(link.gone)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that is well answers, however long that takes on a busy machine."""
    monkeypatch.setattr(ray_link, "STACKS_TIME", PATIENCE)
    monkeypatch.setattr(ray_link, "KILL_TIME", PATIENCE)


async def soon(future: Awaitable[Ending]) -> Ending:
    """What it gives, even if whoever waited for it is cancelled."""
    return await asyncio.wait_for(asyncio.shield(future), PATIENCE)


async def ended(pids: list[int]) -> None:
    await until(lambda: not any(map(is_alive, pids)), "processes are still there")


def numbered(count: int, size: int = 4) -> list[bytes]:
    return [number.to_bytes(4, "big").ljust(size, b".") for number in range(count)]


def unpacked(parts: list[bytes]) -> list[bytes]:
    splitter = FrameSplitter()
    return [frame for part in parts for frame in splitter.feed(part)]


def test_batches_are_as_large_as_may_be() -> None:
    frames = [b"x" * (BATCH_BYTES // 3)] * 5 + [b"y" * 3 * BATCH_BYTES, b"z"]
    assert [len(batch) // len(frames[0]) for batch in batches(frames)] == [3, 2, 9, 0]
    assert b"".join(batches(frames)) == b"".join(frames)
    assert list(batches([])) == []


def test_first_frame_after_a_pause_leaves_at_once_and_more_leave_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def gather() -> None:
        gatherer = Gatherer()
        gatherer.put(b"first")
        began = loop.time()
        assert unpacked(await gatherer.take()) == [b"first"]
        assert loop.time() == began

        gatherer.put(b"a")
        loop.call_later(0.003, gatherer.put, b"b")
        assert unpacked(await gatherer.take()) == [b"a", b"b"]
        assert loop.time() - began == pytest.approx(GATHER_TIME)

        def put_seven() -> None:
            for _ in range(7):
                gatherer.put(b"x")

        gatherer.put(b"x")
        loop.call_soon(put_seven)
        began = loop.time()
        assert len(await gatherer.take()) == GATHER_FRAMES
        assert loop.time() == began

    # Time passes here only when there is nothing else to do.
    monkeypatch.setattr(stepped_loop, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    loop = stepped_loop.SteppedLoop(when_idle=lambda: False)
    monkeypatch.setattr(relay, "time", SimpleNamespace(monotonic=loop.time))
    loop.run_until_complete(gather())
    loop.close()


async def test_closed_gatherer_gives_what_is_left_and_then_nothing() -> None:
    gatherer = Gatherer()
    gatherer.put(b"a")
    assert await gatherer.take()
    gatherer.put(b"b")
    gatherer.close()
    assert unpacked(await gatherer.take()) == [b"b"]
    assert await gatherer.take() == []


async def test_relay_sends_batches_in_the_order_of_their_numbers() -> None:
    relay = Relay("echo", EchoLink, {})
    assert await relay.open() is None
    parts = list(map(framed, numbered(4)))
    for number in (2, 0, 3, 1):
        await relay.forward(number, parts[number])
    received: list[bytes] = []
    while len(received) < 4:
        batch = await relay.receive()
        assert isinstance(batch, bytes)
        received += unpacked([batch])
    assert received == numbered(4)
    await relay.kill()
    ending = await relay.receive()
    assert isinstance(ending, Ending)
    assert ending.signal_name == "SIGKILL"


async def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    link = Echo()
    with pytest.raises(MLXEngineError, match=r"not installed: pip install .*\[ray\]'$"):
        await link.open()
    assert "not installed" in link.gone.result().detail
    link.send(b"nothing happens")
    link.terminate()
    link.kill()
    await link.dump_stacks()


@on_ray
async def test_without_a_cluster_the_error_says_what_to_call(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fail(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(MLXEngineError, match=r"call ray\.init\(\) first: Could not find any"):
        await Echo().open()


@on_ray
async def test_thousand_frames_keep_their_order_both_ways_in_few_items(
    ray_cluster: RayCluster,
) -> None:
    items = 0

    class Counting(FrameSplitter):
        def feed(self, data: bytes) -> Any:
            nonlocal items
            items += 1
            return super().feed(data)

    async with opened() as link:
        for frame in numbered(1000):
            link.send(frame)
        assert await link.frames(1000) == numbered(1000)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_link, "FrameSplitter", Counting)
            async with opened("node_b") as other:
                other.send(b"!many 1000")
                assert await other.frames(1000) == [str(n).encode() for n in range(1000)]
        assert 1 < items < 150

        # Calls of the actor that are under way at the same time.
        for frame in numbered(200, 3000):
            link.send(frame)
            await asyncio.sleep(0)
        assert await link.frames(200) == numbered(200, 3000)


@on_ray
async def test_frames_too_large_for_a_call_come_through(ray_cluster: RayCluster) -> None:
    large = os.urandom(3 * 2**20)
    async with opened("node_b") as link:
        for frame in (b"before", large, b"after"):
            link.send(frame)
        assert await link.frames(3) == [b"before", large, b"after"]


@on_ray
async def test_child_gets_the_environment_variables(ray_cluster: RayCluster) -> None:
    async with opened(env_vars={"ECHO_COLOUR": "blue"}) as link:
        assert await link.ask(b"!env ECHO_COLOUR") == b"blue"


@on_ray
async def test_end_of_the_child_arrives_with_its_code_and_its_last_frames(
    ray_cluster: RayCluster,
) -> None:
    async with opened() as link:
        pids = await link.pids()
        link.send(b"!many 20")
        link.send(b"!exit 3")
        ending = await soon(link.gone)
        assert (ending.exit_code, ending.detail) == (3, "ended with 3")
        assert len(await link.frames(20)) == 20
        await ended(pids)


@on_ray
async def test_terminate_ends_the_child_gracefully(ray_cluster: RayCluster) -> None:
    async with opened() as link:
        pids = await link.pids()
        link.terminate()
        assert (await soon(link.gone)).exit_code == 0
        await ended(pids)


@on_ray
async def test_kill_brings_the_stacks_that_were_dumped(
    ray_cluster: RayCluster, patient: None
) -> None:
    async with opened() as link:
        pids = await link.pids()
        await link.dump_stacks()
        link.kill()
        ending = await soon(link.gone)
        assert ending.signal_name == "SIGKILL"
        assert "Current thread" in ending.stderr
        await ended(pids)


@on_ray
async def test_child_that_hangs_goes_with_its_actor(ray_cluster: RayCluster) -> None:
    async with opened() as link:
        pids = await link.pids()
        link.send(b"!hang")
        await until(lambda: is_stopped(pids[1]))
        link._release()
        await soon(link.gone)
        await ended(pids)


@on_ray
async def test_killed_actor_is_known_at_once_and_its_child_ends(ray_cluster: RayCluster) -> None:
    async with opened() as link:
        pids = await link.pids()
        os.kill(pids[0], signal.SIGKILL)
        ending = await soon(link.gone)
        assert ending.exit_code is None
        assert f"(process {pids[0]} on " in ending.detail
        assert "ActorDiedError" in ending.detail
        assert "\n" not in ending.detail
        await ended(pids)


@on_ray
async def test_stopped_actor_is_killed_all_the_same(ray_cluster: RayCluster) -> None:
    async with opened() as link:
        pids = await link.pids()
        os.kill(pids[0], signal.SIGSTOP)
        link.send(b"nobody reads this")
        began = time.monotonic()
        await link.dump_stacks()
        assert time.monotonic() - began < PROMPTLY
        link.kill()
        assert "did not answer" in (await soon(link.gone)).detail
        os.kill(pids[0], signal.SIGCONT)
        await ended(pids)


@on_ray
async def test_lost_node_is_noticed_and_leaves_nothing(ray_cluster: RayCluster) -> None:
    node = ray_cluster.add_node("node_c")
    try:
        link = Echo("node_c")
        await link.open()
        pids = await link.pids()
    finally:
        await asyncio.to_thread(ray_cluster.remove_node, node)
    assert "its Ray actor" in (await soon(link.gone)).detail
    await ended(pids)


@on_ray
async def test_actor_that_cannot_be_placed_is_withdrawn_when_open_is_cancelled(
    ray_cluster: RayCluster,
) -> None:
    link = Echo("nowhere")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            asked = asyncio.create_task(expire(limit, lambda: link._actor is not None))
            await link.open()
    await asked
    assert "had not placed its actor, which asks for {'CPU': 0, 'nowhere': 1}" in (
        link.gone.result().detail
    )
    node = ray_cluster.add_node("nowhere")
    try:
        async with opened("nowhere") as other:
            assert await other.ask(b"hello") == b"hello"
        assert link.place is None
    finally:
        await asyncio.to_thread(ray_cluster.remove_node, node)


@on_ray
@pytest.mark.parametrize("delay", [0, 0.001, 0.3])
async def test_open_that_is_cancelled_leaves_no_actor(
    ray_cluster: RayCluster, delay: float
) -> None:
    link = Echo()
    opening = asyncio.create_task(link.open())
    await asyncio.sleep(delay)
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await opening
    link.kill()
    await soon(link.gone)
    await no_actors()


@on_ray
@pytest.mark.parametrize("delay", [0, 0.02, 0.2])
async def test_link_that_is_killed_while_it_opens_leaves_no_actor(
    ray_cluster: RayCluster, delay: float
) -> None:
    link = Echo()
    opening = asyncio.create_task(link.open())
    await asyncio.wait({opening}, timeout=delay)
    was_open = opening.done()  # on a fast machine
    link.kill()
    if was_open:
        await opening
    else:
        with pytest.raises(EngineDead, match="killed"):
            await opening
    ending = await soon(link.gone)  # Ray may tell of the signal first
    assert "killed" in ending.detail or ending.exit_code == -9
    await no_actors()


async def no_actors() -> None:
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(actors_alive):
            await asyncio.sleep(0.05)


def actors_alive() -> list[str]:
    import ray._private.state

    table = ray._private.state.actors()
    return [key for key, actor in table.items() if actor["State"] != "DEAD"]


@on_ray
async def test_core_that_cannot_be_started_is_an_error(ray_cluster: RayCluster) -> None:
    link = Echo(name="broken")
    with pytest.raises(EngineDead, match="broken cannot be started: there is no core"):
        await link.open()
    assert link.gone.result().detail == "there is no core"


@on_ray
async def test_options_that_ray_refuses_are_an_error(ray_cluster: RayCluster) -> None:
    link = RayLink("odd", resources={"CPU": 1})
    with pytest.raises(MLXEngineError, match="Ray refuses"):
        await link.open()
    assert link.gone.done()


@on_ray
async def test_link_whose_follower_is_cancelled_ends_its_actor(ray_cluster: RayCluster) -> None:
    async with opened() as link:
        pids = await link.pids()
        assert link._follower is not None
        link._follower.cancel()
        assert "dropped" in (await soon(link.gone)).detail
        await ended(pids)


def actor_of(engine: RayEngine) -> int:
    assert engine._client.connection is not None
    link = engine._client.connection.link
    assert isinstance(link, RayLink)
    assert link.place is not None
    return link.place.pid


@on_ray
async def test_engine_on_another_node_answers_and_ends(
    ray_cluster: RayCluster, tiny_path: Path
) -> None:
    async with RayEngine(tiny_path, resources={"node_b": 1}) as engine:
        result = await engine.generate("hello", max_tokens=8, ignore_eos=True)
        assert result.usage.completion_tokens == 8
        async with engine.stream_generate("hello", max_tokens=50, ignore_eos=True) as stream:
            tokens = [token async for chunk in stream for token in chunk.tokens]
        assert len(tokens) == 50
        pids = [actor_of(engine)]
    assert (await engine.wait_exit()).kind == "graceful"
    await ended(pids)


@on_ray
async def test_engine_on_another_node_dies_with_its_actor(
    ray_cluster: RayCluster, tiny_path: Path
) -> None:
    engine = RayEngine(tiny_path, resources={"node_b": 1})
    await engine.start()
    request = asyncio.create_task(engine.generate("hello", max_tokens=5000, ignore_eos=True))
    await until(lambda: engine._client.connection and engine._client.connection.calls.busy)
    os.kill(actor_of(engine), signal.SIGKILL)
    with pytest.raises(EngineDead, match="its Ray actor"):
        await asyncio.wait_for(request, PROMPTLY)
    assert (await engine.wait_exit()).kind == "crash"
    await engine.stop()


SHUTDOWN = """
import asyncio, sys
import ray
from tests.remote.test_ray_link import Echo

async def main():
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    link = Echo("node_b")
    await link.open()
    await asyncio.sleep(0.1)
    ray.shutdown()
    await asyncio.sleep(0.3)
    link.send(b"nobody reads this")
    await link.dump_stacks()
    link.terminate()
    link.kill()
    print((await asyncio.wait_for(link.gone, 60)).detail)
    assert not ray.is_initialized()

asyncio.run(main())
print("alive")
"""


@on_ray
async def test_shutdown_of_ray_ends_the_link_and_not_the_application(
    ray_cluster: RayCluster,
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SHUTDOWN, ray_cluster.cluster.address]
    output = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, cwd=ROOT
    )
    assert "actor" in output.stdout, output.stderr
    assert output.stdout.endswith("alive\n")


DRIVER = """
import asyncio, sys
import ray
from tests.remote.test_ray_link import Echo

async def main():
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    link = Echo("node_b")
    await link.open()
    print("pids:", *await link.pids(), flush=True)
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@on_ray
@pytest.mark.parametrize("how", ["killed", "dropped"])
async def test_driver_that_ends_takes_its_actor_along(ray_cluster: RayCluster, how: str) -> None:
    driver = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-W", "ignore", "-c", DRIVER, ray_cluster.cluster.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        line = ""
        while not line.startswith("pids:"):  # Ray tells there, too, of nodes that are dead
            line = await asyncio.to_thread(driver.stdout.readline)
            assert line, "it has ended"
        pids = [int(pid) for pid in line.split()[1:]]
        assert len(pids) == 2
        if how == "killed":
            driver.kill()
        else:
            driver.stdin.write("\n")
            driver.stdin.flush()
        await ended(pids)
