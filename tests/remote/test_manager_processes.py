"""A manager of real processes, and real signals."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import EngineDead, EngineState, EngineStopped, InvalidRequest, ModelLoadError
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.replicas.manager import EngineManager
from mlx_engine.remote.replicas.restarts import RestartPolicy
from tests.conftest import other_tasks
from tests.processes import children
from tests.remote.lives import LONG, NAMED, pid_of, watch_closely
from tests.waiting import PROMPTLY, turns, until

pytestmark = pytest.mark.anyio

QUICK = RestartPolicy(backoff=0.05)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not children()


@pytest.fixture
async def manager(tiny_path: Path) -> AsyncIterator[EngineManager]:
    """A running manager of two processes, each with many requests at once."""
    manager = EngineManager(tiny_path, replicas=2, engine="batched", restart=QUICK)
    async with manager:
        yield manager
    # A shutdown with a deadline does not wait for the end of what it has killed.
    await until(lambda: not other_tasks(), "tasks are left")


def engine_of(manager: EngineManager, name: str) -> LinkedEngine:
    (replica,) = [one for one in manager._supervisor.everyone if one.name == name]
    return replica.engine


def send(manager: EngineManager, name: str, number: signal.Signals) -> None:
    """Send a signal to the process of a replica."""
    os.kill(pid_of(engine_of(manager, name)), number)


def at_work(manager: EngineManager) -> list[str]:
    """The replicas that have requests."""
    return [name for name, stats in manager.replica_stats().items() if stats.running]


async def until_all_run(manager: EngineManager, restarts: int) -> None:
    await until(
        lambda: (
            all(info.state == "running" for info in manager.replicas)
            and sum(info.restarts for info in manager.replicas) >= restarts
        )
    )


async def until_at_work(manager: EngineManager) -> str:
    await until(lambda: at_work(manager))
    return at_work(manager)[0]


async def test_it_is_used_as_an_engine(manager: EngineManager, tmp_path: Path) -> None:
    assert manager.has_chat_template
    result = await manager.generate([1, 2, 3], max_tokens=8)
    assert result.request_id == "req-1"
    batch = await manager.generate_batch([[1, 2, 3]] * 5, max_tokens=8)
    assert [one.tokens for one in batch] == [result.tokens] * 5  # type: ignore[union-attr]
    async with manager.stream_chat([{"role": "user", "content": "hi"}], max_tokens=8) as stream:
        chunks = [chunk async for chunk in stream]
    assert sum((chunk.tokens for chunk in chunks), ()) == stream.result.tokens
    assert all(health.healthy for health in manager.check_health().values())
    assert await manager.save_prompt_cache(tmp_path / "cache") > 0
    assert await manager.load_prompt_cache(tmp_path / "cache") > 0
    with pytest.raises(InvalidRequest, match="func"):
        await manager.run_blocking(print)


async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    manager = EngineManager(tmp_path / "none", replicas=2)
    with pytest.raises(ModelLoadError):
        await manager.start()
    assert manager.state is EngineState.CREATED
    assert not children()
    with pytest.raises(InvalidRequest, match="max_batch_size"):
        EngineManager(tmp_path, max_batch_size=3)


async def test_a_model_that_is_gone_when_its_process_comes_back(
    tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_path)
    policy = RestartPolicy(max_restarts=1, backoff=0.0)
    async with EngineManager(tmp_path / "model", restart=policy) as manager:
        (tmp_path / "model").unlink()
        send(manager, "replica-1", signal.SIGKILL)
        waiting = asyncio.create_task(manager.generate("hi"))
        with pytest.raises(EngineDead, match="did not start: ModelLoadError"):
            await waiting
        assert manager.state is EngineState.FAILED


async def test_a_killed_process_costs_no_request_that_has_emitted_nothing(
    manager: EngineManager,
) -> None:
    expected = await manager.generate([1, 2, 3], max_tokens=200, ignore_eos=True)
    whole = asyncio.create_task(
        manager.generate(
            [1, 2, 3], max_tokens=200, ignore_eos=True, logits_processors=[NAMED + "slow"]
        )
    )
    name = await until_at_work(manager)
    pids = {info.name: info.pid for info in manager.replicas}
    send(manager, name, signal.SIGKILL)
    result = await whole
    assert result.tokens == expected.tokens
    await until_all_run(manager, 1)
    (ended,) = [info for info in manager.replicas if info.restarts]
    assert ended.name == name
    assert ended.pid not in (None, pids[name])
    os.kill(ended.pid or 0, 0)
    assert ended.last_exit is not None
    assert (ended.last_exit.kind, ended.last_exit.signal) == ("crash", "SIGKILL")
    assert manager.stats().completion_tokens >= 400
    assert (manager.stats().failed, manager.stats().finished) == (1, 2)


async def test_a_stream_that_has_begun_gets_the_end_of_its_process(manager: EngineManager) -> None:
    began = time.monotonic()
    async with manager.stream_generate([1, 2, 3], **LONG) as stream:
        await anext(stream)
        send(manager, await until_at_work(manager), signal.SIGKILL)
        with pytest.raises(EngineDead) as dead:
            async for _ in stream:
                pass
    assert dead.value.signal == "SIGKILL"
    assert time.monotonic() - began < PROMPTLY
    assert manager.stats().failed == 1
    assert (await manager.generate([1], max_tokens=2)).tokens  # the other one, at once
    await until_all_run(manager, 1)
    assert manager.stats().failed == 1


async def test_a_request_that_kills_its_process(manager: EngineManager) -> None:
    with pytest.raises(EngineDead) as dead:
        await manager.generate([1], logits_processors=[NAMED + "abort"])
    assert dead.value.signal == "SIGABRT"
    await until_all_run(manager, 2)
    assert (await manager.generate([1], max_tokens=2)).tokens


async def test_a_process_that_is_stuck_is_ended_and_comes_back(manager: EngineManager) -> None:
    stuck = asyncio.create_task(manager.generate([1], logits_processors=[NAMED + "park"]))
    name = await until_at_work(manager)
    await watch_closely(engine_of(manager, name), decode=1)
    await until_all_run(manager, 1)
    (ended,) = [info for info in manager.replicas if info.restarts]
    assert ended.name == name
    assert ended.last_exit is not None
    assert ended.last_exit.kind == "stalled"
    stuck.cancel()
    report = await manager.shutdown(0)
    assert report.aborted in ((), ("req-1",))
    with pytest.raises((asyncio.CancelledError, EngineStopped)):
        await stuck


async def test_somebody_elses_sigterm_lets_requests_finish(manager: EngineManager) -> None:
    # Long enough to be at work still when that is told, four times a second.
    async with manager.stream_generate([1, 2, 3], max_tokens=2000, ignore_eos=True) as stream:
        await anext(stream)
        send(manager, await until_at_work(manager), signal.SIGTERM)
        async for _ in stream:
            pass
    assert len(stream.result.tokens) == 2000
    await until_all_run(manager, 1)
    (ended,) = [info for info in manager.replicas if info.restarts]
    assert ended.last_exit is not None
    assert ended.last_exit.kind == "graceful"


async def test_scaling_with_requests_in_flight(manager: EngineManager) -> None:
    options: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True}
    asked = [asyncio.create_task(manager.generate([n + 1], **options)) for n in range(6)]
    await until_at_work(manager)
    await manager.scale(1)
    assert len(children()) == 1
    await manager.scale(2)
    assert [info.name for info in manager.replicas][1] == "replica-3"
    results = await asyncio.gather(*asked)
    assert [len(result.tokens) for result in results] == [300] * 6


async def test_stopped_processes_hold_up_no_shutdown(manager: EngineManager) -> None:
    asked = [asyncio.create_task(manager.generate([n + 1], **LONG)) for n in range(4)]
    await until_at_work(manager)
    for name in ("replica-1", "replica-2"):
        send(manager, name, signal.SIGSTOP)
    began = time.monotonic()
    report = await manager.shutdown(0.5)
    assert time.monotonic() - began < PROMPTLY
    assert len(report.aborted) == 4
    for task in asked:
        with pytest.raises(EngineStopped):
            await task


async def test_kills_among_many_requests(manager: EngineManager) -> None:
    """Every request comes to an end, and no answer is spliced of two."""
    prompts = [[n + 1, 2, 3] for n in range(24)]
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    expected = [(await manager.generate(prompt, **options)).tokens for prompt in prompts]
    slow = {**options, "logits_processors": [NAMED + "slow"]}
    asked = [asyncio.create_task(manager.generate(prompt, **slow)) for prompt in prompts]
    first = await until_at_work(manager)
    (other,) = {info.name for info in manager.replicas} - {first}
    send(manager, first, signal.SIGKILL)
    await until(lambda: engine_of(manager, first).state is not EngineState.RUNNING)
    await turns()  # half of the requests are with the other one now, and under both kills
    send(manager, other, signal.SIGKILL)
    await until_all_run(manager, 2)
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(not isinstance(end, BaseException) for end in ends) > 0
    for end, tokens in zip(ends, expected, strict=True):
        if isinstance(end, BaseException):
            assert isinstance(end, EngineDead)
            assert end.signal == "SIGKILL"
        else:
            assert end.tokens == tokens
