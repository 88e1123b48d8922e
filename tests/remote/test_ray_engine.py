"""Engines and replicas on the nodes of a Ray cluster, and every way in which they may end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    EngineDead,
    EngineManager,
    EngineState,
    GenerationResult,
    ProcessEngine,
    RestartPolicy,
    Watchdog,
)
from mlx_engine.remote.links.ray_link import RayLink
from mlx_engine.remote.ray_engine import RayEngine
from tests.memory.machines import machine_of
from tests.remote.conftest import RayCluster
from tests.remote.lives import LONG, watch_closely
from tests.waiting import PATIENCE, PROMPTLY, expire, until

pytestmark = [pytest.mark.anyio, pytest.mark.ray]

HERE = {"env_vars": {"OMP_NUM_THREADS": "2"}}


def actor_of(engine: Any) -> int:
    link = engine._client.connection.link
    assert isinstance(link, RayLink)
    assert link.place is not None
    return link.place.pid


@pytest.fixture
async def engines(
    ray_cluster: RayCluster, tiny_path: Path
) -> AsyncIterator[tuple[RayEngine, RayEngine]]:
    """One on each node."""
    a, b = (RayEngine(tiny_path, resources={node: 1}, **HERE) for node in ("node_a", "node_b"))
    async with a, b:
        yield a, b


async def test_replicas_on_a_node_share_its_memory(
    ray_cluster: RayCluster, tiny_path: Path
) -> None:
    """Each would find all of it free. Both nodes are this machine, as is this process."""
    with machine_of(64 * 2**20) as book:
        a, b = (RayEngine(tiny_path, resources={node: 1}, **HERE) for node in ("node_a", "node_b"))
        async with a:
            assert a.stats().memory.limit == book.use.processes == 64 * 2**20
            async with b:
                parts = [one.use.processes for one in book.accounts]
                assert len(parts) == 2
                assert sum(parts) <= 64 * 2**20
                assert min(parts) > 8 * 2**20
                await until(lambda: a.stats().memory.limit == parts[0], "it was not told")
                assert b.stats().memory.limit == parts[1]
                assert (await a.generate("a", max_tokens=2)).tokens
            assert book.use.processes == 64 * 2**20, "what the other had comes back"
        assert book.accounts == ()


async def under_way(engine: RayEngine) -> asyncio.Task[GenerationResult]:
    task = asyncio.create_task(engine.generate("a", **LONG))
    await until(lambda: engine.stats().completion_tokens)
    return task


async def test_it_gives_what_an_engine_here_gives(
    engines: tuple[RayEngine, RayEngine], tiny_path: Path
) -> None:
    async with ProcessEngine(tiny_path) as near:
        expected = await near.generate("hello", max_tokens=60, temperature=1, seed=3)
        for far in engines:
            got = await far.generate("hello", max_tokens=60, temperature=1, seed=3)
            assert got.tokens == expected.tokens
            stream = far.stream_generate("hello", max_tokens=60, temperature=1, seed=3)
            async with stream:
                tokens = [token async for chunk in stream for token in chunk.tokens]
            assert tuple(tokens) == expected.tokens
            with pytest.raises(ValueError, match="prompt: token id"):
                await far.generate([99999])
            assert far.check_health().healthy


async def test_a_cancel_and_a_dropped_stream_stop_the_work_there(
    engines: tuple[RayEngine, RayEngine],
) -> None:
    engine = engines[0]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            at_work = asyncio.create_task(expire(limit, lambda: engine.stats().running))
            await engine.generate("a", **LONG)
    await at_work
    stream = engine.stream_generate("a", **LONG)
    async for _ in stream:
        break
    with pytest.warns(ResourceWarning, match="dropped before"):
        del stream
    await until(lambda: not engine.stats().running and engine.stats().cancelled == 2)
    before = engine.stats().completion_tokens
    assert (await engine.generate("b", max_tokens=3)).finish_reason == "length"
    assert engine.stats().completion_tokens == before + 3, "nothing else has gone on"


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_the_end_of_an_actor_is_told_and_the_other_goes_on(
    engines: tuple[RayEngine, RayEngine], how: str
) -> None:
    a, b = engines
    dying, living = await under_way(a), await under_way(b)
    pid = actor_of(a)
    os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    if how == "stop":
        await watch_closely(a, silence=1.5)
    with pytest.raises(EngineDead) as caught:
        await dying
    assert a.state is EngineState.FAILED
    end = await a.wait_exit()
    assert end.kind == ("crash" if how == "kill" else "stalled")
    assert ("no sign of life" if how == "stop" else "Ray actor") in str(caught.value)
    if how == "stop":
        os.kill(pid, signal.SIGCONT)
    before = b.stats().completion_tokens
    await until(lambda: b.stats().completion_tokens > before)
    assert not living.done()
    living.cancel()
    await asyncio.gather(a.restart(), a.restart())
    assert (await a.generate("a", max_tokens=2)).tokens


async def test_a_crash_of_the_process_there_tells_its_last_words(
    engines: tuple[RayEngine, RayEngine],
) -> None:
    with pytest.raises(EngineDead) as caught:
        await engines[0].generate("a", logits_processors=["tests.remote.processors:abort"])
    assert caught.value.signal == "SIGABRT"
    assert "in abort" in caught.value.stderr
    assert engines[0].last_exit is not None
    assert engines[0].last_exit.kind == "crash"


async def test_a_graceful_end_is_told_apart(engines: tuple[RayEngine, RayEngine]) -> None:
    async with engines[0].stream_generate("a", max_tokens=1000, ignore_eos=True) as stream:
        await anext(stream)
        report = await engines[0].shutdown(10 * PATIENCE)
    assert report.finished == (stream.request_id,)
    assert len(stream.result.tokens) == 1000
    assert engines[0].last_exit is not None
    assert (engines[0].last_exit.kind, engines[0].last_exit.exit_code) == ("graceful", 0)


async def test_an_actor_that_cannot_be_placed_has_a_time_limit(
    ray_cluster: RayCluster, tiny_path: Path
) -> None:
    engine = RayEngine(tiny_path, resources={"moon": 1}, watchdog=Watchdog(start=0.8))
    began = time.monotonic()
    with pytest.raises(EngineDead, match=r"Watchdog\.start"):
        await engine.start()
    assert time.monotonic() - began < PROMPTLY
    assert engine.state is EngineState.CREATED


async def test_replicas_on_nodes_one_of_which_is_lost(
    ray_cluster: RayCluster, tiny_path: Path
) -> None:
    node = ray_cluster.add_node("node_d")
    manager = EngineManager.on_ray(
        tiny_path,
        replicas=2,
        resources={"node_d": 1},
        restart=RestartPolicy(backoff=0.05),
        **HERE,
    )
    async with manager:
        one = await manager.generate("hello", max_tokens=20)
        other = ray_cluster.add_node("node_d")  # where they can go
        ray_cluster.remove_node(node)
        # A request that is with one of them now may die with that, and with the other one too.
        await until(lambda: all(info.last_exit for info in manager.replicas))
        async with asyncio.timeout(PATIENCE):
            again = await manager.generate("hello", max_tokens=20)
        assert again.tokens == one.tokens
        await until(lambda: all(i.last_exit and i.state == "running" for i in manager.replicas))
        ends = [info.last_exit for info in manager.replicas]
        assert [end and end.kind for end in ends] == ["crash", "crash"]
        assert (await manager.generate("hello", max_tokens=20)).tokens == one.tokens
        await manager.scale(1)
        assert len(manager.replicas) == 1
        assert (await manager.generate("hello", max_tokens=20)).tokens == one.tokens
    ray_cluster.remove_node(other)
