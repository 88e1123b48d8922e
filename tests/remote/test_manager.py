"""A manager of replicas that do what the test says: restarts, retries, scaling, shutdown."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_engine import (
    EngineBusy,
    EngineDead,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationError,
    InvalidRequest,
    ModelLoadError,
)
from mlx_engine.remote.replicas import replica_set, routed
from mlx_engine.remote.replicas.manager import EngineManager
from mlx_engine.remote.replicas.restarts import RestartPolicy
from mlx_engine.remote.replicas.waiting_room import waiting_limits
from tests.conftest import other_tasks
from tests.remote.scripted import Scripted, ScriptedRequest, World
from tests.waiting import PATIENCE, PROMPTLY, until

pytestmark = pytest.mark.anyio

AT_ONCE = RestartPolicy(max_restarts=3, backoff=0.0, max_backoff=0.0)
NEVER = RestartPolicy(max_restarts=0)


@pytest.fixture
def world() -> World:
    return World()


def managed(
    world: World, replicas: int = 2, restart: RestartPolicy = AT_ONCE, **limits: Any
) -> EngineManager:
    return EngineManager._of(world.make, replicas, restart, waiting_limits(limits))  # type: ignore[arg-type]


@pytest.fixture
async def manager(world: World) -> AsyncIterator[EngineManager]:
    """A running manager of two replicas."""
    async with managed(world) as manager:
        yield manager
    assert not other_tasks()


def states(manager: EngineManager) -> list[str]:
    return [info.state for info in manager.replicas]


async def requested(world: World, count: int = 1) -> list[ScriptedRequest]:
    """The requests in flight, once there are so many."""
    await until(lambda: len(world.requests) == count)
    return world.requests


async def all_run(manager: EngineManager, restarts: int) -> None:
    """All replicas run, after so many restarts together."""
    await until(
        lambda: (
            sum(info.restarts for info in manager.replicas) == restarts
            and all(info.state == "running" for info in manager.replicas)
        )
    )


async def generating(manager: EngineManager, **options: Any) -> asyncio.Task[Any]:
    """A request of its own task, which has reached its replica, or waits for one."""
    task = asyncio.create_task(manager.generate("hi", **options))
    before = manager.stats()
    await until(lambda: task.done() or _inside(manager) > before.running + before.waiting)
    return task


def _inside(manager: EngineManager) -> int:
    stats = manager.stats()
    return stats.running + stats.waiting


# The start ------------------------------------------------------------------------------------


async def test_all_replicas_start_at_once(world: World) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    world.starts.extend(gates)
    manager = managed(world, 3)
    start = asyncio.create_task(manager.start())
    await until(lambda: not world.starts)
    assert manager.state is EngineState.STARTING
    for gate in gates:
        assert not start.done()
        gate.set()
    await start
    assert manager.state is EngineState.RUNNING
    assert [info.name for info in manager.replicas] == ["replica-1", "replica-2", "replica-3"]
    assert states(manager) == ["running"] * 3
    assert manager.has_chat_template
    assert manager.context_length == 1000
    await manager.stop()
    assert not manager.replicas


@pytest.mark.parametrize(
    "error", [ModelLoadError("no such model"), InvalidRequest("kv_bits", "no"), EngineDead("oops")]
)
async def test_if_one_does_not_start_all_are_stopped(world: World, error: Exception) -> None:
    world.starts.extend([None, error, asyncio.Event()])
    manager = managed(world, 3)
    with pytest.raises(type(error), match=str(error)):
        await manager.start()
    assert manager.state is EngineState.CREATED
    assert not manager.replicas
    assert not other_tasks()
    assert world[1].state is EngineState.STOPPED
    async with manager:  # and may be started again
        assert len(manager.replicas) == 3


async def test_a_cancelled_start_leaves_nothing(world: World) -> None:
    world.starts.extend([None, asyncio.Event()])
    manager = managed(world)
    start = asyncio.create_task(manager.start())
    await until(lambda: not world.starts and world[1].state is EngineState.RUNNING)
    for _ in range(3):
        start.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await start
    assert manager.state is EngineState.CREATED
    assert world[1].state is EngineState.STOPPED
    assert not other_tasks()


async def test_a_shutdown_ends_a_start(world: World) -> None:
    world.starts.extend([None, asyncio.Event()])
    manager = managed(world)
    start = asyncio.create_task(manager.start())
    await until(lambda: not world.starts)
    await manager.shutdown(None)
    with pytest.raises(EngineStopped):
        await start
    assert manager.state is EngineState.STOPPED
    assert world[1].state is EngineState.STOPPED
    assert not other_tasks()


async def test_what_is_wrong_is_said_before_anything_starts(world: World) -> None:
    for replicas in (0, -1, 1.5, True, None):
        with pytest.raises(InvalidRequest) as refused:
            EngineManager._of(world.make, replicas)  # type: ignore[arg-type]
        assert refused.value.option == "replicas"
    with pytest.raises(InvalidRequest) as refused:
        EngineManager._of(world.make, 1, restart=3)  # type: ignore[arg-type]
    assert refused.value.option == "restart"
    manager = managed(world)
    with pytest.raises(EngineNotStarted):
        await manager.generate("hi")
    with pytest.raises(EngineNotStarted):
        await manager.scale(3)
    with pytest.raises(InvalidRequest):
        manager.stream_generate("hi", decode="other")  # type: ignore[arg-type]


# Requests -------------------------------------------------------------------------------------


async def test_answers_have_the_ids_of_the_manager(manager: EngineManager) -> None:
    first = await manager.generate("hi")
    assert first.request_id == "req-1"
    async with manager.stream_chat([{"role": "user", "content": "hi"}]) as stream:
        chunks = [chunk async for chunk in stream]
    assert len(chunks) == 1
    assert stream.request_id == stream.result.request_id == "req-2"
    assert manager.stats().finished == 2


async def test_requests_are_shared_out(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    tasks = [await generating(manager) for _ in range(4)]
    assert [len(world[1].requests), len(world[2].requests)] == [2, 2]
    for request in world.requests:
        request.finish()
    for task in tasks:
        await task
    assert manager.stats().running == 0
    assert {name: stats.finished for name, stats in manager.replica_stats().items()} == {
        "replica-1": 2,
        "replica-2": 2,
    }


async def test_the_same_beginning_goes_to_the_same_replica(manager: EngineManager) -> None:
    long = "It was a dark and stormy night. " * 100
    results = [await manager.generate(long + str(number)) for number in range(6)]
    assert {result.text for result in results} == {"replica-1: x"}


async def test_a_batch_takes_all_replicas(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    batch = asyncio.create_task(manager.generate_batch(["a"] * 9))
    assert len(await requested(world, 6)) == 6  # two in each, and two more that wait
    world.answer_at_once = True
    for request in world.requests:
        request.finish()
    assert len(await batch) == 9


async def test_other_errors_are_not_tried_again(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    world.requests[0].fail(GenerationError("a processor raised"))
    with pytest.raises(GenerationError):
        await task
    assert not world.requests


async def test_a_cancelled_request_leaves_its_replica(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not world.requests
    stream = manager.stream_generate("hi")
    async with stream:
        (request,) = await requested(world)
        request.token()
        assert (await anext(stream)).tokens == (1,)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.tokens == (1,)
    assert stream.result.request_id == stream.request_id
    assert request.cancelled


async def test_a_busy_replica_is_passed_over(world: World, manager: EngineManager) -> None:
    world[1].busy = True
    for _ in range(3):
        assert (await manager.generate("hi")).text.startswith("replica-2")
    world[2].busy = True
    with pytest.raises(EngineBusy) as refused:
        await manager.generate("hi")
    assert refused.value.retry_after == 1.0  # the shorter one


async def test_functions_cannot_go_there(manager: EngineManager) -> None:
    with pytest.raises(InvalidRequest, match="func"):
        await manager.run_blocking(print)


# Ends and restarts ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crash", "stalled"])
async def test_a_replica_that_ends_is_started_again(
    world: World, manager: EngineManager, kind: str
) -> None:
    world[1].crash(kind)
    await all_run(manager, 1)
    info = manager.replicas[0]
    assert (info.name, info.restarts) == ("replica-1", 1)
    assert info.last_exit is not None
    assert info.last_exit.kind == kind
    assert len(world.lives["replica-1"]) == 2
    assert len(world.lives["replica-2"]) == 1
    assert manager.state is EngineState.RUNNING


async def test_the_counters_of_the_dead_still_count(world: World, manager: EngineManager) -> None:
    for _ in range(4):
        await manager.generate("hi")
    world[1].nbytes = 7
    gate = asyncio.Event()
    world.starts.append(gate)
    world[1].crash()
    assert manager.stats().finished == 4
    await until(lambda: not world.starts)
    assert manager.stats().finished == 4
    gate.set()
    await all_run(manager, 1)
    await manager.generate("hi")
    stats = manager.stats()
    assert stats.state == "running"
    assert (stats.finished, stats.prompt_cache.hits, stats.prompt_cache.nbytes) == (5, 3, 0)
    await manager.scale(1)
    assert manager.stats().finished == 5


async def test_others_are_watched_while_one_restarts(world: World) -> None:
    async with managed(world, 3) as manager:
        gate = asyncio.Event()
        world.starts.append(gate)
        world[1].crash()
        await until(lambda: not world.starts)
        assert states(manager) == ["restarting", "running", "running"]
        world[3].crash()
        await until(lambda: manager.replicas[2].restarts == 1)
        await until(lambda: states(manager) == ["restarting", "running", "running"])
        for _ in range(4):
            assert not (await manager.generate("hi")).text.startswith("replica-1")
        gate.set()
        await until(lambda: states(manager) == ["running"] * 3)


async def test_a_restart_that_fails_is_tried_again(world: World, manager: EngineManager) -> None:
    world.starts.extend([ModelLoadError("the disk is away"), None])
    world[1].crash()
    await all_run(manager, 2)
    last = manager.replicas[0].last_exit
    assert last is not None
    assert last.kind == "crash"
    assert "the disk is away" in last.detail


async def test_a_restart_that_never_succeeds_is_given_up(world: World) -> None:
    async with managed(world, 1) as manager:
        world.starts.extend([ModelLoadError("the disk is away")] * 4)
        world[1].crash()
        await until(lambda: manager.state is EngineState.FAILED)
        assert len(world.lives["replica-1"]) == 4
        with pytest.raises(EngineDead, match="the disk is away"):
            await manager.generate("hi")


async def test_one_that_ends_too_often_is_given_up(
    world: World, manager: EngineManager, caplog: pytest.LogCaptureFixture
) -> None:
    for restarts in range(1, 4):
        world[1].crash()
        await all_run(manager, restarts)
    with caplog.at_level(logging.ERROR):
        world[1].crash()
        await until(lambda: [info.name for info in manager.replicas] == ["replica-2"])
    assert "replica-1 is given up: it ended 4 times" in caplog.text
    assert manager.state is EngineState.RUNNING
    assert (await manager.generate("hi")).text.startswith("replica-2")
    await manager.scale(2)  # brings another one
    assert [info.name for info in manager.replicas] == ["replica-2", "replica-3"]


async def test_when_none_is_left_the_manager_has_failed(world: World) -> None:
    async with managed(world, 1, NEVER) as manager:
        world.answer_at_once = False
        task = await generating(manager)
        world[1].crash()
        with pytest.raises(EngineDead) as dead:
            await task
        assert dead.value.signal == "SIGKILL"
        await until(lambda: manager.state is EngineState.FAILED)
        with pytest.raises(EngineDead, match=r"max_restarts=0.*SIGKILL") as dead:
            await manager.generate("hi")
        assert (dead.value.signal, dead.value.exit_code, dead.value.phase) == (
            "SIGKILL",
            -9,
            "decode",
        )
        with pytest.raises(EngineDead, match="max_restarts=0"):
            await manager.scale(2)
    assert manager.state is EngineState.STOPPED
    async with manager:
        assert (await asyncio.gather(manager.generate("hi"), _finish(world)))[0].tokens == (1,)


async def _finish(world: World) -> None:
    (request,) = await requested(world)
    request.finish()


async def test_somebody_elses_sigterm_does_not_count(world: World) -> None:
    async with managed(world, 1, RestartPolicy(max_restarts=0, backoff=0.0)) as manager:
        for restarts in range(1, 8):
            world[1].terminate()
            await all_run(manager, restarts)
        assert manager.state is EngineState.RUNNING


async def test_if_nobody_watches_any_more_the_manager_fails_loudly(
    manager: EngineManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world_error = RuntimeError("a bug")

    def follow_up(*_: object) -> None:
        raise world_error

    monkeypatch.setattr(manager._supervisor, "_follow_up", follow_up)
    replica = next(iter(manager._replicas))
    replica.engine.kill()
    await until(lambda: manager.state is EngineState.FAILED)
    assert "the monitor of the replicas has ended" in caplog.text
    with pytest.raises(EngineDead, match="watched no more: RuntimeError: a bug"):
        await manager.generate("hi")


async def test_health_of_each(world: World, manager: EngineManager) -> None:
    world.starts.append(asyncio.Event())
    assert all(health.healthy for health in manager.check_health().values())
    world[1].crash()
    await until(lambda: not world.starts)
    health = manager.check_health()
    assert [health[name].healthy for name in ("replica-1", "replica-2")] == [False, True]


# Requests whose replica ends ------------------------------------------------------------------


async def test_a_request_is_done_again_if_nothing_was_emitted(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    stream = manager.stream_generate("hi")
    async with stream:
        both = await requested(world, 2)
        assert [request.engine.name for request in both] == ["replica-1", "replica-2"]
        world[1].crash()
        await until(lambda: len(world[2].requests) == 2)
        world[2].requests[1].token()  # of generate, whose caller sees none of it
        world[2].crash()
        (again,) = await requested(world)
        again.finish()
        assert [chunk.tokens async for chunk in stream] == [(1,)]
    with pytest.raises(EngineDead):  # two ends under it
        await task


async def test_one_end_is_one_end_even_if_the_engine_does_not_know_of_it_yet(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    await manager.scale(1)
    task = await generating(manager)
    world.requests[0].fail(EngineDead("the pipe is broken"))  # its state is still RUNNING
    (request,) = await requested(world)
    assert request.engine is world.lives["replica-1"][1]
    request.finish()
    await task


async def test_a_stream_that_has_begun_is_not(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    async with manager.stream_generate("hi") as stream:
        (request,) = await requested(world)
        request.token()
        assert (await anext(stream)).tokens == (1,)
        request.engine.crash()
        with pytest.raises(EngineDead) as dead:
            await anext(stream)
    assert dead.value.signal == "SIGKILL"
    assert not world.requests


async def test_what_kills_its_replicas_is_not_tried_for_ever(world: World) -> None:
    async with managed(world, 3) as manager:
        world.answer_at_once = False
        poison = await generating(manager)
        for _ in range(2):
            (request,) = await requested(world)
            request.engine.crash()
            await until(functools.partial(_is_off, world, request))
        with pytest.raises(EngineDead):
            await poison
        await all_run(manager, 2)


def _is_off(world: World, request: ScriptedRequest) -> bool:
    return request not in world.requests


async def test_a_replica_that_somebody_stops_costs_no_request(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    world[1].terminate()
    (request,) = await requested(world)
    assert request.engine is world[2]
    request.finish()
    await task


async def test_a_stream_under_which_somebody_stops_the_replica_says_so(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    async with manager.stream_generate("hi") as stream:
        (request,) = await requested(world)
        request.token()
        await anext(stream)
        world[1].terminate()
        with pytest.raises(EngineDead, match="stopped by somebody else"):
            await anext(stream)


async def test_requests_wait_while_all_restart(world: World) -> None:
    async with managed(world, 1) as manager:
        gate = asyncio.Event()
        world.starts.append(gate)
        world[1].crash()
        await until(lambda: not world.starts)
        task = await generating(manager)
        impatient = await generating(manager)
        assert manager.stats().waiting == 2
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        stream = manager.stream_generate("hi")
        async with stream:
            await until(lambda: manager.stats().waiting == 2)
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.request_id == stream.request_id
        assert manager.stats().waiting == 1
        gate.set()
        assert (await task).finish_reason == "stop"
        assert manager.stats().waiting == 0


async def test_those_that_wait_are_told_when_there_is_no_hope(world: World) -> None:
    policy = RestartPolicy(max_restarts=1, backoff=0.0)
    async with managed(world, 1, policy) as manager:
        gate = asyncio.Event()

        async def fail() -> None:
            await gate.wait()
            raise ModelLoadError("the disk is away")

        world.starts.append(fail)
        world[1].crash()
        await until(lambda: not world.starts)
        tasks = [await generating(manager) for _ in range(3)]
        gate.set()
        for task in tasks:
            with pytest.raises(EngineDead, match="the disk is away"):
                await task
        assert manager.state is EngineState.FAILED


async def down(world: World, manager: EngineManager, *numbers: int) -> asyncio.Event:
    """Replicas restart, and do not get far before the event."""
    gate = asyncio.Event()
    world.starts.extend([gate] * len(numbers))
    for number in numbers:
        world[number].crash()
    await until(lambda: not world.starts)
    return gate


async def test_no_more_wait_for_a_replica_than_the_queue_may_have(world: World) -> None:
    async with managed(world, 2, queue_limit=3) as manager:
        gate = await down(world, manager, 1, 2)
        waiting = [await generating(manager) for _ in range(3)]
        with pytest.raises(EngineBusy, match=r"3 requests wait for one \(queue_limit=3\)") as busy:
            await manager.generate("hi")
        assert busy.value.retry_after >= 1
        with pytest.raises(EngineBusy):
            await anext(manager.stream_generate("hi"))
        with pytest.raises(EngineBusy):
            await manager.load_prompt_cache("cache")
        assert (manager.stats().waiting, manager.stats().rejected) == (3, 3)
        waiting[0].cancel()
        await asyncio.wait({waiting[0]})
        waiting[0] = await generating(manager)
        gate.set()
        for task in waiting:
            assert (await task).finish_reason == "stop"
        assert (manager.stats().waiting, manager.stats().rejected) == (0, 3)


async def test_without_a_word_about_it_those_who_wait_are_bounded_too(world: World) -> None:
    async with managed(world, 1) as manager:
        gate = await down(world, manager, 1)
        tasks = [asyncio.create_task(manager.generate("hi")) for _ in range(1100)]
        await until(lambda: sum(task.done() for task in tasks) == 76)
        assert manager.stats().waiting == 1024
        gate.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(end, EngineBusy) for end in ends) == 76
        assert manager.stats().rejected == 76


async def test_a_request_waits_for_a_replica_no_longer_than_max_wait(world: World) -> None:
    async with managed(world, 1, max_wait=0.1) as manager:
        gate = await down(world, manager, 1)
        began = time.monotonic()
        with pytest.raises(EngineBusy, match=r"waited for 0.1 s \(max_wait\)") as busy:
            await manager.generate("hi")
        assert time.monotonic() - began >= 0.1
        assert busy.value.retry_after >= 1
        assert manager.stats().rejected == 1
        gate.set()
        await all_run(manager, 1)
        assert (await manager.generate("hi")).finish_reason == "stop"


async def test_waiting_counts_together_however_often_it_begins(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that comes up and falls at once gives nobody another turn of waiting."""
    now = 0.0  # by the clock of those who wait
    for module in (replica_set, routed):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    world.answer_at_once = False
    policy = RestartPolicy(max_restarts=10, backoff=0.0)
    async with managed(world, 1, policy, max_wait=1000) as manager:
        task = await generating(manager)
        await requested(world)
        gate = await down(world, manager, 1)
        await until(lambda: manager.stats().waiting == 1)
        now += 700
        gate.set()
        await requested(world)
        assert not task.done()
        gate = asyncio.Event()
        world.starts.append(gate)
        world[1].terminate()  # which is nobody's fault
        await until(lambda: manager.stats().waiting == 1)
        assert not task.done()
        now += 400
        with pytest.raises((EngineBusy, EngineDead)):
            await asyncio.wait_for(task, PROMPTLY)
        gate.set()


@pytest.mark.parametrize("limits", [{"queue_limit": 0}, {"max_wait": 0}])
async def test_who_may_not_wait_is_refused_while_no_replica_is_up(
    world: World, limits: dict[str, Any]
) -> None:
    async with managed(world, 1, **limits) as manager:
        assert (await manager.generate("hi")).finish_reason == "stop"
        gate = await down(world, manager, 1)
        with pytest.raises(EngineBusy, match=f"{next(iter(limits))}=0"):
            await manager.generate("hi")
        gate.set()
        await all_run(manager, 1)
        assert (await manager.generate("hi")).finish_reason == "stop"


async def test_who_is_refused_is_told_when_a_replica_is_likely_to_be_up(world: World) -> None:
    patient = RestartPolicy(backoff=25.0, max_backoff=30.0)
    async with managed(world, 1, patient, queue_limit=0) as manager:
        world[1].crash()
        await until(lambda: states(manager) == ["restarting"])
        with pytest.raises(EngineBusy, match="try again in about 2") as busy:
            await manager.generate("hi")
        assert 20 < busy.value.retry_after <= 25.1


async def test_the_limits_of_replicas_are_those_of_waiting_for_one() -> None:
    assert waiting_limits({}).queue_limit == 1024
    assert waiting_limits({}).max_wait == 600
    given = waiting_limits({"queue_limit": 7, "max_wait": None})
    assert (given.queue_limit, given.max_wait) == (7, None)
    for wrong in ({"queue_limit": -1}, {"max_wait": "x"}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            EngineManager("demo", **wrong)  # type: ignore[arg-type]


# Scaling --------------------------------------------------------------------------------------


async def test_more_replicas(world: World, manager: EngineManager) -> None:
    await manager.scale(4)
    assert states(manager) == ["running"] * 4
    world[4].crash()  # they are watched as well
    await until(lambda: manager.replicas[3].restarts == 1)
    await manager.scale(4)


async def test_new_replicas_that_do_not_start_leave_the_others_alone(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    world.starts.extend([None, ModelLoadError("no memory")])
    with pytest.raises(ModelLoadError, match="no memory"):
        await manager.scale(4)
    assert states(manager) == ["running"] * 2
    assert world[3].state is EngineState.STOPPED
    world.requests[0].finish()
    await task


async def test_fewer_replicas_by_draining(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    tasks = [await generating(manager, max_tokens=tokens) for tokens in (100, 50)]
    scaling = asyncio.create_task(manager.scale(1))
    await until(lambda: "leaving" in states(manager))
    assert [(info.name, info.state) for info in manager.replicas] == [
        ("replica-1", "running"),
        ("replica-2", "leaving"),  # it has fewer tokens to do
    ]
    third = await generating(manager)
    assert len(world[1].requests) == 2
    assert not scaling.done()
    assert world[2].stops[0][1] is None
    for request in world.requests:
        request.finish()
    for task in (*tasks, third):
        await task
    await scaling
    assert [info.name for info in manager.replicas] == ["replica-1"]
    assert len(world.lives["replica-2"]) == 1
    assert manager.stats().finished == 3


async def test_one_that_restarts_leaves_first(world: World, manager: EngineManager) -> None:
    world.starts.append(asyncio.Event())
    world[1].crash()
    await until(lambda: not world.starts)
    await manager.scale(1)
    assert [info.name for info in manager.replicas] == ["replica-2"]


async def test_scaling_twice_at_once(world: World, manager: EngineManager) -> None:
    gates = [asyncio.Event() for _ in range(2)]
    world.starts.extend(gates)
    up = asyncio.create_task(manager.scale(4))
    await until(lambda: not world.starts)
    down = asyncio.create_task(manager.scale(1))
    for gate in gates:
        gate.set()
    await asyncio.gather(up, down)
    assert len(manager.replicas) == 1


async def test_a_cancelled_scaling_stops_what_starts(world: World, manager: EngineManager) -> None:
    world.starts.extend([None, asyncio.Event()])
    scaling = asyncio.create_task(manager.scale(4))
    await until(lambda: not world.starts and world[3].state is EngineState.RUNNING)
    scaling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scaling
    assert world[3].state is EngineState.STOPPED
    assert states(manager) == ["running"] * 2


async def test_a_cancelled_scaling_lets_those_go_that_leave(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    tasks = [await generating(manager) for _ in range(2)]
    scaling = asyncio.create_task(manager.scale(1))
    await until(lambda: "leaving" in states(manager))
    scaling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scaling
    for request in world.requests:
        request.finish()
    await asyncio.gather(*tasks)
    await until(lambda: len(manager.replicas) == 1)


async def test_a_shutdown_while_scaling(world: World, manager: EngineManager) -> None:
    world.starts.append(asyncio.Event())
    scaling = asyncio.create_task(manager.scale(3))
    other = asyncio.create_task(manager.scale(5))
    await until(lambda: not world.starts)
    await manager.stop()
    for each in (scaling, other):
        with pytest.raises(EngineStopped):
            await each
    assert not other_tasks()


async def test_a_replica_that_dies_while_it_leaves(world: World, manager: EngineManager) -> None:
    world.answer_at_once = False
    tasks = [await generating(manager, max_tokens=tokens) for tokens in (100, 50)]
    scaling = asyncio.create_task(manager.scale(1))
    await until(lambda: "leaving" in states(manager))
    world[2].crash()
    await scaling
    assert len(world.lives["replica-2"]) == 1
    for request in await requested(world, 2):  # the one that it had has moved
        assert request.engine is world[1]
        request.finish()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("replicas", [0, -1, 1.5, True, "2"])
async def test_counts_that_cannot_be(manager: EngineManager, replicas: Any) -> None:
    with pytest.raises(InvalidRequest, match="replicas"):
        await manager.scale(replicas)


# The prompt caches ----------------------------------------------------------------------------


async def test_prompt_caches(world: World, manager: EngineManager, tmp_path: Path) -> None:
    world[1].nbytes, world[2].nbytes = 3, 5
    assert await manager.save_prompt_cache(tmp_path / "file") == 5
    assert (world[1].saved, world[2].saved) == ([], [tmp_path / "file"])
    assert await manager.load_prompt_cache(tmp_path / "file") == 5
    assert world[1].saved == [tmp_path / "file"]
    with pytest.raises(InvalidRequest, match="broken"):
        await manager.load_prompt_cache(tmp_path / "broken")


# The shutdown ---------------------------------------------------------------------------------


async def test_a_shutdown_lets_requests_finish(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world)
    await manager.start()
    tasks = [await generating(manager) for _ in range(2)]
    shutdown = asyncio.create_task(manager.shutdown(None))
    await until(lambda: manager.state is EngineState.DRAINING)
    with pytest.raises(EngineStopped):
        await manager.generate("hi")
    with pytest.raises(EngineStopped):
        await manager.scale(3)
    for request in world.requests:
        request.finish()
    report = await shutdown
    assert (report.finished, report.aborted) == (("req-1", "req-2"), ())
    assert [(await task).request_id for task in tasks] == ["req-1", "req-2"]
    assert await manager.shutdown(0) == report
    assert not other_tasks()


async def test_a_crash_while_draining_costs_no_request(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world, 1)
    await manager.start()
    task = await generating(manager)
    shutdown = asyncio.create_task(manager.shutdown(None))
    await until(lambda: manager.state is EngineState.DRAINING)
    world[1].crash()
    (request,) = await requested(world)
    request.finish()
    assert (await shutdown).finished == ("req-1",)
    await task


async def test_a_shutdown_aborts_the_rest(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world)
    await manager.start()
    done, late = [await generating(manager) for _ in range(2)]
    stream = manager.stream_generate("hi")
    async with stream:
        requests = await requested(world, 3)
        shutdown = asyncio.create_task(manager.shutdown(0.2))
        await until(lambda: manager.state is EngineState.DRAINING)
        requests[0].finish()
        report = await shutdown
        with pytest.raises(EngineStopped):
            await anext(stream)
    await done
    with pytest.raises(EngineStopped):
        await late
    assert (report.finished, sorted(report.aborted)) == (("req-1",), ["req-2", "req-3"])
    assert not other_tasks()


async def test_all_replicas_are_stopped_at_the_same_time_and_those_that_are_stuck_killed(
    world: World,
) -> None:
    world.answer_at_once = False
    manager = managed(world, 3)
    await manager.start()
    tasks = [await generating(manager) for _ in range(3)]
    for number in (1, 2, 3):
        world[number].stuck = True
    tasks[0].cancel()  # and waits for its replica, which does not answer
    began = time.monotonic()
    report = await manager.shutdown(0.3)
    assert 0.3 <= time.monotonic() - began < PATIENCE
    stops = [world[number].stops[0][0] for number in (1, 2, 3)]
    kills = [killed for number in (1, 2, 3) if (killed := world[number].killed)]
    assert len(kills) == 3
    assert max(stops) < min(kills), "none had to wait for another one's end"
    assert len(report.aborted) == 3
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    for task in tasks[1:]:
        with pytest.raises(EngineStopped):
            await task
    assert not other_tasks()


async def test_a_shutdown_from_two_tasks_the_earlier_deadline_counts(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world)
    await manager.start()
    task = await generating(manager)
    patient = asyncio.create_task(manager.shutdown(None))
    await until(lambda: manager.state is EngineState.DRAINING)
    assert (await manager.shutdown(0)).aborted == ("req-1",)
    assert (await patient).aborted == ("req-1",)
    with pytest.raises(EngineStopped):
        await task


async def test_a_shutdown_during_a_restart(world: World) -> None:
    manager = managed(world, 1)
    await manager.start()
    world.starts.append(asyncio.Event())
    world[1].crash()
    await until(lambda: not world.starts)
    task = await generating(manager)
    began = time.monotonic()
    report = await manager.shutdown(0.1)
    assert time.monotonic() - began < PROMPTLY
    assert report.aborted == ("req-1",)
    with pytest.raises(EngineStopped):
        await task
    assert not other_tasks()


async def test_a_shutdown_during_the_wait_before_a_restart(world: World) -> None:
    manager = managed(world, 1, RestartPolicy(backoff=1000.0, max_backoff=1000.0))
    await manager.start()
    world[1].crash()
    await until(lambda: states(manager) == ["restarting"])
    await asyncio.wait_for(manager.stop(), PROMPTLY)
    assert len(world.lives["replica-1"]) == 1
    assert not other_tasks()


async def test_a_cancelled_shutdown_stops_everything(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world)
    await manager.start()
    task = await generating(manager)
    shutdown = asyncio.create_task(manager.shutdown(None))
    await until(lambda: manager.state is EngineState.DRAINING)
    for _ in range(3):
        shutdown.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await shutdown
    with pytest.raises(EngineStopped):
        await task
    assert manager.state is EngineState.STOPPED
    assert [world[number].state for number in (1, 2)] == [EngineState.STOPPED] * 2
    assert not other_tasks()


async def test_a_shutdown_while_a_replica_leaves(world: World) -> None:
    world.answer_at_once = False
    manager = managed(world)
    await manager.start()
    tasks = [await generating(manager) for _ in range(2)]
    scaling = asyncio.create_task(manager.scale(1))
    await until(lambda: "leaving" in states(manager))
    world[2].stuck = True
    began = time.monotonic()
    await manager.shutdown(0.1)
    assert time.monotonic() - began < PROMPTLY
    await scaling
    for task in tasks:
        with pytest.raises(EngineStopped):
            await task
    assert not other_tasks()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
async def test_timeouts_that_cannot_be(manager: EngineManager, timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        await manager.shutdown(timeout)
    assert manager.state is EngineState.RUNNING


def test_requests_from_another_event_loop(world: World) -> None:
    async def serve() -> None:
        async with managed(world) as manager:

            def elsewhere() -> None:
                async def ask() -> None:
                    assert (await manager.generate("hi")).tokens == (1,)
                    with pytest.raises(RuntimeError, match="event loop"):
                        await manager.stop()

                asyncio.run(ask())

            await asyncio.to_thread(elsewhere)

    asyncio.run(serve())


def test_a_manager_that_an_event_loop_has_left_can_be_stopped(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    manager = managed(world)
    asyncio.run(manager.start())
    assert manager.state is EngineState.FAILED  # nobody watches any more
    assert "the monitor of the replicas has ended" in caplog.text
    asyncio.run(manager.stop())
    assert manager.state is EngineState.STOPPED


async def test_what_the_scripted_replica_is(world: World) -> None:
    """It has what a manager asks of ``LinkedEngine``."""
    made = Scripted("one", world)
    async with made:
        assert made.check_health().healthy
    assert (await made.wait_exit()).kind == "graceful"


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_every_request_ends_and_nothing_is_left(
    world: World, seed: int
) -> None:
    chance = random.Random(seed)
    world.answer_at_once = False
    manager = managed(world, 3, RestartPolicy(max_restarts=1000, backoff=0.0))
    await manager.start()
    asked: list[asyncio.Task[str]] = []
    scalings: list[asyncio.Task[None]] = []
    for _ in range(300):
        running = [
            engine
            for engines in world.lives.values()
            for engine in engines
            if engine.state is EngineState.RUNNING
        ]
        match chance.randrange(12):
            case 0 if running:
                chance.choice(running).crash()
            case 1 if running:
                chance.choice(running).terminate()
            case 2 if running:
                chance.choice(running).busy ^= True
            case 3:
                scalings.append(asyncio.create_task(manager.scale(chance.randint(1, 5))))
            case 4 if asked or scalings:
                chance.choice([*asked, *scalings]).cancel()
            case 5:
                world.starts.append(chance.choice([None, ModelLoadError("no")]))
            case 6 | 7 if world.requests:
                chance.choice(world.requests).finish()
            case 8 if world.requests:
                chance.choice(world.requests).token()
            case _:
                asked.append(asyncio.create_task(_read(manager, chance.random() < 0.5)))
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
    assert manager.state is EngineState.RUNNING
    report = await manager.shutdown(chance.choice([0, 0.05]))
    assert not other_tasks() - {*asked, *scalings}
    ends = await asyncio.gather(*asked, *scalings, return_exceptions=True)
    for end in ends:
        allowed = asyncio.CancelledError | EngineDead | EngineStopped | EngineBusy | ModelLoadError
        assert not isinstance(end, BaseException) or isinstance(end, allowed)
    answered = {end for end in ends if isinstance(end, str)}
    assert answered
    assert not answered & {*report.aborted}
    assert manager.stats().running == manager.stats().waiting == 0
    for engine in (engine for engines in world.lives.values() for engine in engines):
        assert engine.state is not EngineState.RUNNING
        assert not engine.requests
    assert not other_tasks()


async def _read(manager: EngineManager, stream: bool) -> str:
    if not stream:
        return (await manager.generate("hi")).request_id
    async with manager.stream_generate("hi") as chunks:
        async for _ in chunks:
            pass
    return chunks.request_id


# Time limits, jobs, and a manager that comes back ---------------------------------------------


async def test_max_wait_of_a_request_is_of_all_its_waiting(world: World) -> None:
    async with managed(world, 1) as manager:
        gate = await down(world, manager, 1)
        with pytest.raises(EngineBusy, match=r"waited for 0.05 s \(max_wait\)"):
            await manager.generate("hi", max_wait=0.05)
        with pytest.raises(EngineBusy, match="max_wait=0"):
            await manager.generate("hi", max_wait=0)
        world.answer_at_once = False
        task = await generating(manager, max_wait=60, timeout=5)
        await asyncio.sleep(0.02)
        gate.set()
        (request,) = await requested(world)
        assert request.ask.timeout == 5
        assert request.ask.max_wait is not None
        assert 0 < request.ask.max_wait <= 60 - 0.02
        request.finish()
        await task


async def test_a_failed_manager_is_restarted_once_for_all(world: World) -> None:
    async with managed(world, 2, NEVER) as manager:
        world[1].crash()
        world[2].crash()
        await until(lambda: manager.state is EngineState.FAILED)
        with pytest.raises(EngineDead) as dead:
            await manager.generate("hi")
        assert dead.value.retryable
        await asyncio.gather(*(manager.restart() for _ in range(3)))
        assert manager.state is EngineState.RUNNING
        assert states(manager) == ["running"] * 2
        assert (await manager.generate("hi")).finish_reason == "stop"
        await manager.restart()
        assert len(world.lives) == 5  # with the prototype


async def test_what_may_be_what_kills_replicas_is_not_to_be_tried_again(
    world: World, manager: EngineManager
) -> None:
    world.answer_at_once = False
    task = await generating(manager)
    (first,) = await requested(world)
    first.engine.crash()
    await until(lambda: world.requests not in ([], [first]))
    (second,) = world.requests
    second.engine.crash()
    with pytest.raises(EngineDead) as dead:
        await task
    assert not dead.value.retryable


async def test_a_map_goes_on_while_replicas_come_and_go(
    world: World, manager: EngineManager
) -> None:
    done = 0
    async for outcome in manager.map((str(n) for n in range(50)), retries=1, ordered=True):
        assert outcome.ok
        assert outcome.id == done
        done += 1
        if done in (10, 30):
            world[1 + (done == 30)].crash()
    assert done == 50


async def test_all_replicas_are_warmed(world: World, manager: EngineManager) -> None:
    await manager.warm("a beginning")
    assert [world[number].served for number in (1, 2)] == [1, 1]
