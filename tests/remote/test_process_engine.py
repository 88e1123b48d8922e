"""An engine in a process of its own: its life, its ends, and what its users are told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from mlx_engine import (
    BaseEngine,
    EngineDead,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    ModelLoadError,
    ProcessEngine,
    ShutdownReport,
    Watchdog,
)
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.links.process_link import ProcessLink
from tests.conftest import ROOT
from tests.processes import children, is_alive
from tests.remote.lives import (
    LONG,
    NAMED,
    appears,
    ends,
    have_patience,
    pid_of,
    process_of,
    watch_closely,
)
from tests.remote.processors import GATE
from tests.stuck import StuckModel
from tests.waiting import PATIENCE, PROMPTLY, expire, until, until_now

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["simple", "batched"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def engine(tiny_path: Path) -> AsyncIterator[ProcessEngine]:
    async with ProcessEngine(tiny_path, engine="batched") as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Whatever a test does, its children are gone soon after."""
    yield
    gc.collect()
    until_now(lambda: not children(), "processes are left behind")


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processors tell where they are: see there."""
    monkeypatch.setenv(GATE, str(tmp_path))
    return tmp_path


@pytest.fixture
def stuck(tiny_path: Path, tmp_path: Path) -> Iterator[StuckModel]:
    model = StuckModel(tiny_path, tmp_path / "stuck")
    yield model
    model.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    have_patience(monkeypatch)


# The states


async def test_its_life(tiny_path: Path, kind: Any) -> None:
    engine = ProcessEngine(tiny_path, engine=kind)
    assert engine.state is EngineState.CREATED
    assert engine.stats().state == "created"
    assert not engine.has_chat_template
    assert not engine.check_health().healthy
    with pytest.raises(EngineNotStarted):
        await engine.generate("a")
    with pytest.raises(EngineNotStarted):
        await engine.wait_exit()
    for _ in range(2):
        await engine.start()
        await engine.start()
        assert engine.state is EngineState.RUNNING
        assert engine.check_health().healthy
        pid = pid_of(engine)
        assert (await engine.generate("a", max_tokens=2)).finish_reason == "length"
        assert engine.stats().finished == 1
        assert await engine.stop() == ShutdownReport()
        assert await engine.stop() == ShutdownReport()
        assert not is_alive(pid)
        assert engine.state is EngineState.STOPPED
        assert engine.last_exit is not None
        assert (engine.last_exit.kind, engine.last_exit.exit_code) == ("graceful", 0)
        with pytest.raises(EngineStopped):
            await engine.generate("a")


async def test_a_model_that_is_not_there_and_then_is(tiny_path: Path, tmp_path: Path) -> None:
    engine = ProcessEngine(tmp_path / "model")
    with pytest.raises(ModelLoadError, match="model"):
        await engine.start()
    assert engine.state is EngineState.CREATED
    (tmp_path / "model").symlink_to(tiny_path)
    async with engine:
        assert (await engine.generate("a", max_tokens=2)).tokens


async def test_loading_is_told_in_the_event_loop(tiny_path: Path) -> None:
    told: list[tuple[str, bool]] = []

    def tell(progress: Any) -> None:
        told.append((progress.phase, asyncio.get_running_loop() is loop))

    loop = asyncio.get_running_loop()
    async with ProcessEngine(tiny_path, on_progress=tell):
        assert ("load", True) in told


@pytest.mark.parametrize("moment", ["at once", "starting", "loading"])
async def test_a_cancelled_start_leaves_nothing(stuck: StuckModel, moment: str) -> None:
    engine = ProcessEngine(stuck.path)
    moments: dict[str, Callable[[], object]] = {
        "at once": lambda: True,
        "starting": lambda: process_of(engine),
        "loading": lambda: stuck.is_read,
    }
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            expiring = asyncio.create_task(expire(limit, moments[moment]))
            await engine.start()
    await expiring
    assert engine.state is EngineState.CREATED
    assert not children()


async def test_stopped_while_it_loads(stuck: StuckModel) -> None:
    engine = ProcessEngine(stuck.path)
    start = asyncio.create_task(engine.start())
    await until(lambda: stuck.is_read)
    await engine.shutdown(None)  # which does not wait for the load
    with pytest.raises(EngineStopped):
        await start
    assert engine.state is EngineState.STOPPED


@pytest.mark.parametrize("moment", ["starting", "loading"])
async def test_killed_while_it_starts(stuck: StuckModel, moment: str) -> None:
    engine = ProcessEngine(stuck.path)
    start = asyncio.create_task(engine.start())
    await until(lambda: process_of(engine) and (moment == "starting" or stuck.is_read))
    os.kill(pid_of(engine), signal.SIGKILL)
    with pytest.raises(EngineDead, match="SIGKILL") as caught:
        await start
    assert caught.value.phase in ("start", "load")
    assert engine.state is EngineState.CREATED
    stuck.repair()
    async with engine:
        pass


async def test_killed_before_anybody_was_told_that_it_is_there(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as late:
        late.setattr(ProcessLink, "_started", lambda link: None)
        engine = ProcessEngine(tiny_path)
        start = asyncio.create_task(engine.start())
        await until(lambda: process_of(engine))
        os.kill(pid_of(engine), signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL") as caught:
            await start
    assert (caught.value.phase, caught.value.signal) == ("start", "SIGKILL")
    assert caught.value.exit_code == -signal.SIGKILL
    async with engine:
        pass


async def test_dropped_without_a_stop_it_warns_and_ends(tiny_path: Path) -> None:
    engine = ProcessEngine(tiny_path)
    await engine.start()
    pid = pid_of(engine)
    with pytest.warns(ResourceWarning, match="dropped without being stopped"):
        del engine
        gc.collect()
    await ends(pid)


# Cancellation


@pytest.mark.parametrize("how", ["once", "often", "timeout", "anyio", "stream"])
async def test_a_cancelled_caller_waits_until_the_work_is_out_of_mlx(
    gate: Path, tiny_path: Path, kind: Any, how: str
) -> None:
    async with ProcessEngine(tiny_path, engine=kind) as engine:

        async def work() -> None:
            options = {**LONG, "logits_processors": [NAMED + "Gate"]}
            if how == "stream":
                async with engine.stream_generate("a", **options) as stream:
                    async for _ in stream:
                        pass
            else:
                await engine.generate("a", **options)

        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def scoped() -> None:
            if how == "timeout":
                async with asyncio.timeout(None) as limit:
                    over.add_done_callback(lambda _: limit.reschedule(0))
                    await work()
            elif how == "anyio":
                with anyio.fail_after(math.inf) as scope:
                    over.add_done_callback(lambda _: setattr(scope, "deadline", -math.inf))
                    await work()
            else:
                await work()

        task = asyncio.create_task(scoped())
        await appears(gate / "inside")
        if how in ("timeout", "anyio"):
            over.set_result(None)
        else:
            for _ in range(5 if how == "often" else 1):
                task.cancel()
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not task.done(), "the caller has left, but the work is inside"
        assert not (gate / "out").exists()
        (gate / "go").touch()
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            await task
        assert (gate / "out").exists()
        assert (await engine.generate("b", max_tokens=3)).finish_reason == "length"
        assert engine.stats().cancelled == 1
        assert engine.stats().running == 0


async def test_cancelled_at_any_moment_it_leaves_nothing(engine: ProcessEngine) -> None:
    for step in range(40):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(step / 4000):
                await engine.generate([7] * 600, max_tokens=5, ignore_eos=True)
    assert (await engine.generate("b", max_tokens=3)).finish_reason == "length"
    assert engine._client.connection is not None
    assert not engine._client.connection.calls.busy
    assert engine.stats().running == engine.stats().waiting == 0


# Death


def counted(engine: BaseEngine) -> tuple[int, int, int, int, int]:
    stats = engine.stats()
    return stats.running, stats.waiting, stats.finished, stats.failed, stats.cancelled


async def test_what_a_kill_has_ended_is_counted_with_what_was_cancelled_apart(
    engine: ProcessEngine,
) -> None:
    await engine.generate("a", max_tokens=2)
    tasks = [asyncio.create_task(engine.generate(f"{number}", **LONG)) for number in range(3)]
    await until(lambda: engine.stats().running + engine.stats().waiting == 3)
    os.kill(pid_of(engine), signal.SIGSTOP)  # it cannot answer that it knows
    question = asyncio.create_task(engine.count_tokens("a"))  # no request
    tasks[1].cancel()
    await asyncio.sleep(0)
    os.kill(pid_of(engine), signal.SIGKILL)
    ends = await asyncio.gather(*tasks, question, return_exceptions=True)
    kinds = [EngineDead, asyncio.CancelledError, EngineDead, EngineDead]
    assert [type(end) for end in ends] == kinds
    assert counted(engine) == (0, 0, 1, 2, 1)
    await engine.stop()
    assert counted(engine) == (0, 0, 1, 2, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kill_is_told_to_everybody_at_once(engine: ProcessEngine, stream: bool) -> None:
    async def one(number: int) -> float:
        with pytest.raises(EngineDead) as caught:
            if stream:
                async with engine.stream_generate(f"{number}", **LONG) as answer:
                    async for _ in answer:
                        pass
            else:
                await engine.generate(f"{number}", **LONG)
        told = time.monotonic()
        error = caught.value
        assert (error.exit_code, error.signal, error.phase) == (-9, "SIGKILL", "decode")
        return told

    tasks = [asyncio.create_task(one(number)) for number in range(8)]
    await until(lambda: engine.stats().completion_tokens >= 30)
    killed = time.monotonic()
    os.kill(pid_of(engine), signal.SIGKILL)
    # Measured in benchmarks: 10 ms. A watchdog would take a minute.
    assert max(await asyncio.gather(*tasks)) - killed < PROMPTLY
    assert engine.state is EngineState.FAILED
    assert counted(engine) == (0, 0, 0, 8, 0)
    with pytest.raises(EngineDead, match="SIGKILL"):
        await engine.generate("a")
    assert (await engine.wait_exit()).kind == "crash"
    await engine.stop()
    await engine.start()
    assert (await engine.generate("a", max_tokens=2)).tokens


@pytest.mark.parametrize(
    ("processor", "code", "words"), [("abort", -6, "in abort"), ("leave", 7, "")]
)
async def test_a_crash_tells_its_last_words(
    engine: ProcessEngine, processor: str, code: int, words: str
) -> None:
    with pytest.raises(EngineDead) as caught:
        await engine.generate("a", logits_processors=[NAMED + processor])
    assert caught.value.exit_code == code
    assert words in caught.value.stderr
    assert words in "".join(traceback.format_exception(caught.value))
    assert not (words and words in str(caught.value)), "a web back end tells that its clients"


async def test_the_death_of_one_does_not_disturb_another(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as one, ProcessEngine(tiny_path) as other:
        expected = (await other.generate("a", max_tokens=300, ignore_eos=True)).tokens
        stream = other.stream_generate("a", max_tokens=300, ignore_eos=True)
        dying = asyncio.create_task(one.generate("a", **LONG))
        tokens: list[int] = []
        async with stream:
            async for chunk in stream:
                tokens += chunk.tokens
                if len(tokens) == 50:
                    one.kill()
        assert tuple(tokens) == expected
        with pytest.raises(EngineDead):
            await dying


async def test_a_cancelled_request_of_a_dead_engine_is_cancelled(
    gate: Path, engine: ProcessEngine
) -> None:
    task = asyncio.create_task(engine.generate("a", logits_processors=[NAMED + "park"]))
    await appears(gate / "inside")
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    engine.kill()
    with pytest.raises(asyncio.CancelledError):
        await task


# Stalls


@pytest.mark.parametrize(
    ("processor", "limit"), [("park", {"decode": 0.8}), ("hold_the_gil", {"silence": 1.2})]
)
async def test_what_is_stuck_in_native_code_is_found_and_killed(
    gate: Path, patient: None, tiny_path: Path, processor: str, limit: dict[str, float]
) -> None:
    async with ProcessEngine(tiny_path) as engine:
        task = asyncio.create_task(engine.generate("a", logits_processors=[NAMED + processor]))
        await appears(gate / "inside")
        await watch_closely(engine, **limit)
        with pytest.raises(EngineDead) as caught:
            await task
        assert f"Watchdog.{next(iter(limit))}" in str(caught.value)
        assert f"in {processor}" in caught.value.stderr, "the stacks are shown"
        assert engine.last_exit is not None
        assert engine.last_exit.kind == "stalled"


async def test_a_stopped_process_is_found_and_killed(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        pid = pid_of(engine)
        os.kill(pid, signal.SIGSTOP)
        await watch_closely(engine, silence=1.0)
        with pytest.raises(EngineDead, match="no sign of life"):
            await engine.generate("a")
        assert not is_alive(pid)


async def test_a_watchdog_that_only_reports(
    gate: Path, patient: None, tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ProcessEngine(tiny_path, name="patient") as engine:
        caplog.set_level("INFO", "mlx_engine")
        task = asyncio.create_task(engine.generate("a", logits_processors=[NAMED + "park"]))
        await appears(gate / "inside")
        await watch_closely(engine, decode=0.4, action="report")
        await until(lambda: "in park" in caplog.text)
        assert "patient: no decode step for" in caplog.text
        assert not task.done()
        engine.kill()
        with pytest.raises(EngineDead):
            await task


async def test_the_health_of_one_that_is_stuck_says_why(gate: Path, tiny_path: Path) -> None:
    limits = Watchdog(decode=0.4, action="report")
    async with ProcessEngine(tiny_path, watchdog=limits) as engine:
        task = asyncio.create_task(engine.generate("a", logits_processors=[NAMED + "park"]))
        await appears(gate / "inside")
        await until(lambda: not engine.check_health().healthy)
        await until(lambda: "Watchdog.decode" in engine.check_health().reason)
        engine.kill()
        with pytest.raises(EngineDead):
            await task


_LIMIT = 2.0  # seconds of a watchdog; a disk that is slow takes longer than that


async def test_a_disk_that_stands_still_in_a_save_stops_no_stream_and_kills_nobody(
    gate: Path, tiny_path: Path, kind: Any, tmp_path: Path
) -> None:
    async with ProcessEngine(tiny_path, engine=kind) as engine:
        await engine.generate([5] * 40, max_tokens=1, logits_processors=[NAMED + "SlowDisk"])
        await watch_closely(engine, prefill=_LIMIT, decode=_LIMIT)
        saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
        await appears(gate / "write 0")
        stands, chunks = time.monotonic(), 0
        options = {"max_tokens": 5000, "ignore_eos": True, "logits_processors": [NAMED + "slow"]}
        async with engine.stream_generate("a", **options) as stream:
            while time.monotonic() < stands + 1.5 * _LIMIT:
                await anext(stream)
                chunks += 1
        assert chunks > 2
        assert not saving.done()
        for number in range(100):
            (gate / f"go {number}").touch()
        assert await saving >= 1
        assert engine.check_health().healthy


async def test_a_save_that_is_slow_from_piece_to_piece_is_alive(
    gate: Path, tiny_path: Path, kind: Any, tmp_path: Path
) -> None:
    async with ProcessEngine(tiny_path, engine=kind) as engine:
        await engine.generate([5] * 40, max_tokens=1, logits_processors=[NAMED + "SlowDisk"])
        await engine.generate([6] * 40, max_tokens=1)
        await watch_closely(engine, prefill=_LIMIT, decode=_LIMIT)
        saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
        for number in range(6):  # each a quarter of what is too long
            await appears(gate / f"write {number}")
            began = time.monotonic()
            await until(lambda began=began: time.monotonic() > began + _LIMIT / 4)  # type: ignore[misc]
            (gate / f"go {number}").touch()
        assert not saving.done()
        for number in range(6, 100):
            (gate / f"go {number}").touch()
        assert await saving == 2


async def test_a_process_that_never_says_anything(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    engine = ProcessEngine(tiny_path, watchdog=Watchdog(start=0.5))
    with pytest.raises(EngineDead, match=r"Watchdog\.start"):
        await engine.start()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(EngineDead, match="could not be started"):
        await engine.start()
    assert engine.state is EngineState.CREATED


# Shutdown


async def in_flight(engine: ProcessEngine, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(engine.generate("a", **options))
    before = engine.stats().completion_tokens
    await until(lambda: engine.stats().completion_tokens != before)
    return task


async def test_shutdown_at_once_aborts_and_tells(engine: ProcessEngine, patient: None) -> None:
    task = await in_flight(engine, **LONG)
    report = await engine.shutdown(0)
    assert len(report.aborted) == 1
    with pytest.raises(EngineStopped):
        await task
    assert engine.last_exit is not None
    assert (engine.last_exit.kind, engine.last_exit.exit_code) == ("graceful", 0)


@pytest.mark.parametrize("timeout", [PATIENCE, None])
async def test_shutdown_lets_requests_finish_and_refuses_new_ones(
    engine: ProcessEngine, timeout: float | None
) -> None:
    task = await in_flight(
        engine, max_tokens=60, ignore_eos=True, logits_processors=[NAMED + "slow"]
    )
    stop = asyncio.create_task(engine.shutdown(timeout))
    await asyncio.sleep(0)
    with pytest.raises(EngineStopped):
        await engine.generate("late")
    assert not stop.done(), "it was refused at once"
    report = await stop
    assert len(report.finished) == 1
    assert len((await task).tokens) == 60
    assert engine.last_exit is not None
    assert engine.last_exit.exit_code == 0


async def test_shutdown_aborts_what_is_left_at_the_deadline(engine: ProcessEngine) -> None:
    tasks = [
        asyncio.create_task(engine.generate(f"{i}", **LONG, logits_processors=[NAMED + "slow"]))
        for i in range(4)
    ]
    await asyncio.sleep(0)
    began = time.monotonic()
    later = 2 * PATIENCE, 3 * PATIENCE
    reports = await asyncio.gather(*(engine.shutdown(when) for when in (later[0], 0.5, later[1])))
    assert 0.4 < time.monotonic() - began < PATIENCE
    assert reports[0] == reports[1] == reports[2]
    assert len(reports[0].aborted) == 4
    for task in tasks:
        with pytest.raises(EngineStopped):
            await task


@pytest.mark.parametrize("processor", ["park", "hold_the_gil"])
async def test_shutdown_of_a_stuck_engine_ends_by_the_deadline(
    gate: Path, tiny_path: Path, processor: str
) -> None:
    engine = ProcessEngine(tiny_path)
    await engine.start()
    pid = pid_of(engine)
    task = asyncio.create_task(engine.generate("a", logits_processors=[NAMED + processor]))
    await appears(gate / "inside")
    began = time.monotonic()
    report = await engine.shutdown(0.3)
    assert 0.2 < time.monotonic() - began < PROMPTLY
    assert len(report.aborted) == 1
    assert not is_alive(pid)
    with pytest.raises(EngineStopped):
        await task
    assert engine.last_exit is not None
    assert engine.last_exit.kind == "stalled"


async def test_shutdown_of_a_stopped_process(tiny_path: Path) -> None:
    engine = ProcessEngine(tiny_path)
    await engine.start()
    os.kill(pid_of(engine), signal.SIGSTOP)
    began = time.monotonic()
    await engine.stop()
    assert time.monotonic() - began < PROMPTLY


async def test_a_cancelled_shutdown_still_ends_it(engine: ProcessEngine) -> None:
    task = await in_flight(engine, **LONG)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await engine.shutdown(None)
    assert engine.state is EngineState.STOPPED
    with pytest.raises(EngineStopped):
        await task


async def test_an_idle_engine_is_shut_down_at_once(engine: ProcessEngine) -> None:
    await engine.generate("a", max_tokens=2)
    began = time.monotonic()
    await engine.shutdown(None)
    assert time.monotonic() - began < PROMPTLY  # 10 ms, on a machine that does nothing else


async def test_sigterm_to_its_process_drains(engine: ProcessEngine) -> None:
    task = await in_flight(
        engine, max_tokens=80, ignore_eos=True, logits_processors=[NAMED + "slow"]
    )
    os.kill(pid_of(engine), signal.SIGTERM)
    await until(lambda: engine.state is not EngineState.RUNNING)
    with pytest.raises(EngineStopped):
        await engine.generate("late")
    assert len((await task).tokens) == 80
    end = await engine.wait_exit()
    assert (end.kind, end.exit_code) == ("graceful", 0)
    await engine.stop()
    await engine.start()
    assert (await engine.generate("a", max_tokens=2)).tokens


async def test_a_second_sigterm_aborts(engine: ProcessEngine) -> None:
    task = await in_flight(engine, **LONG)
    for _ in range(2):  # two at once would be one
        os.kill(pid_of(engine), signal.SIGTERM)
        await until(lambda: engine.state is not EngineState.RUNNING)
    with pytest.raises(EngineStopped):
        await task
    assert (await engine.wait_exit()).exit_code == 0


async def test_sigterm_while_it_loads(stuck: StuckModel) -> None:
    engine = ProcessEngine(stuck.path)
    start = asyncio.create_task(engine.start())
    await until(lambda: stuck.is_read)
    os.kill(pid_of(engine), signal.SIGTERM)
    with pytest.raises(EngineDead, match="SIGTERM") as caught:
        await start
    assert caught.value.exit_code == -signal.SIGTERM
    assert engine.state is EngineState.CREATED


async def test_ctrl_c_in_a_terminal_is_for_the_parent(engine: ProcessEngine) -> None:
    os.kill(pid_of(engine), signal.SIGINT)
    assert (await engine.generate("a", max_tokens=2)).tokens


# Programs: how they start it, and how they end


def program(body: str, tiny_path: Path) -> str:
    return textwrap.dedent(
        """
        import asyncio, os, sys, threading, time
        from mlx_engine import ProcessEngine

        async def main(extra=None):
            async with ProcessEngine({path!r}) as engine:
                tokens = (await engine.generate("hello", max_tokens=9)).tokens
                if extra:
                    await extra(engine)
            print(len(tokens), flush=True)
        """
    ).format(path=str(tiny_path)) + textwrap.dedent(body)


PROGRAMS = {
    "an unguarded script": "asyncio.run(main())",
    "on a thread": "t = threading.Thread(target=lambda: asyncio.run(main())); t.start(); t.join()",
    "after MLX": """
        import mlx.core as mx
        mx.eval(mx.ones(3) + 1)
        asyncio.run(main())
    """,
    "beside an engine": """
        from mlx_engine import SimpleEngine
        async def both():
            async with SimpleEngine(sys.argv[1]) as engine:
                await engine.generate("a", max_tokens=3)
                await main()
        asyncio.run(both())
    """,
    "two loops, one after the other": """
        asyncio.run(main())
        asyncio.run(main())
    """,
    "uvloop": """
        import uvloop
        uvloop.run(main())
    """,
    "never stopped": """
        async def forget():
            global engine
            engine = ProcessEngine(sys.argv[1])
            await engine.start()
            print(len((await engine.generate("hello", max_tokens=9)).tokens), flush=True)
            print(engine._client.connection.link.pid, file=sys.stderr)
        asyncio.run(forget())
    """,
}


@pytest.mark.parametrize("how", PROGRAMS)
def test_it_works_from(how: str, tiny_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "random.py"  # the name of a module of the standard library
    (tmp_path / "types.py").write_text("raise SystemExit('shadowed')")
    script.write_text(program(PROGRAMS[how], tiny_path))
    script = script.rename(tmp_path / "app.py")
    (tmp_path / "types.py").rename(tmp_path / "queue.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "queue.py").unlink()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(script), str(tiny_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"9"}
    assert "Traceback" not in done.stderr


def test_it_works_from_a_script_on_standard_input(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the core took the wrong module')")
    done = subprocess.run(
        [sys.executable, "-P", "-"],
        input=program("asyncio.run(main())", tiny_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (0, "9\n"), done.stderr


def test_it_works_in_a_notebook(tiny_path: Path) -> None:
    """Cells with ``await`` in a loop that runs already; there is no file of the program."""
    cells = f"""
from mlx_engine import ProcessEngine
engine = ProcessEngine({str(tiny_path)!r})
await engine.start()
result = await engine.generate("hello", max_tokens=9)
await engine.stop()
print("tokens:", len(result.tokens))
"""
    done = subprocess.run(
        [sys.executable, "-m", "asyncio"],
        input=cells,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert "tokens: 9" in done.stdout, done.stderr


def test_the_parent_needs_no_mlx(tiny_path: Path) -> None:
    body = """
        asyncio.run(main())
        print(sorted({"mlx", "mlx_lm", "transformers"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", program(body, tiny_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == ["9", "[]"], done.stderr


def test_after_a_fork_it_says_so(engine_on_its_own: ProcessEngine) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(engine_on_its_own.generate("a"))
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        assert "fork" in said.read()


@pytest.fixture
def engine_on_its_own(tiny_path: Path) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(tiny_path)
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())


STATES = {
    "starting": "asyncio.ensure_future(engine.start()); await until(lambda: process_of(engine))",
    "loading": "asyncio.ensure_future(engine.start()); await until(lambda: stuck.is_read)",
    "idle": "await engine.start()",
    "busy": "await engine.start(); await anext(engine.stream_generate('a', max_tokens=9999, "
    "ignore_eos=True))",
    "parked": "await engine.start(); await inside('park')",
    "holding the GIL": "await engine.start(); await inside('hold_the_gil')",
    "stopped": "await engine.start(); os.kill(process_of(engine), 19)",
}
ENDS: dict[str, Callable[[subprocess.Popen[str]], None]] = {
    "killed": lambda process: process.kill(),
    "terminated": lambda process: process.terminate(),
    "exits": lambda process: process.send_signal(signal.SIGUSR2),
}


@pytest.mark.parametrize(
    ("state", "end"),
    [*((state, "killed") for state in STATES), ("idle", "terminated"), ("idle", "exits")],
)
def test_it_never_outlives_its_parent(
    state: str, end: str, tiny_path: Path, gate: Path, tmp_path: Path
) -> None:
    body = f"""
        import signal
        from pathlib import Path
        from tests.remote.lives import NAMED, appears, process_of
        from tests.stuck import StuckModel
        from tests.waiting import until

        async def inside(processor):
            asyncio.ensure_future(engine.generate('a', logits_processors=[NAMED + processor]))
            await appears(Path({str(gate)!r}) / "inside")

        async def run():
            global engine
            path = Path({str(tiny_path)!r})
            if {state!r} in ("starting", "loading"):
                stuck = StuckModel(path, Path({str(tmp_path / "stuck")!r}))
                path = stuck.path
            engine = ProcessEngine(path)
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: sys.exit(3))
            {STATES[state]}
            print(process_of(engine), flush=True)
            await asyncio.sleep(1000)

        asyncio.run(run())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program(body, tiny_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    with process:
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        ENDS[end](process)
        process.wait(PATIENCE)
    until_now(lambda: not is_alive(pid), "the engine's process has outlived its parent")


async def test_from_two_loops_at_once(engine: ProcessEngine) -> None:
    results: list[int] = []

    def other() -> None:
        results.append(len(asyncio.run(engine.generate("a", max_tokens=9)).tokens))

    thread = threading.Thread(target=other)
    thread.start()
    mine = await engine.generate("b", max_tokens=9)
    await until(lambda: not thread.is_alive())
    assert results == [len(mine.tokens)]


async def test_the_io_thread_passes_on_what_happens() -> None:
    async def fail() -> None:
        raise LookupError("there")

    with pytest.raises(LookupError):
        await io_thread.run(fail)
    begun, cleaned = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    task = asyncio.create_task(io_thread.run(wait))
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()
