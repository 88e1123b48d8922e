"""Faults that were found by trying to break engines in processes of their own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    EngineDead,
    EngineManager,
    EngineState,
    EngineStopped,
    GenerationError,
    MLXEngineError,
    ProcessEngine,
    ToolCall,
    Watchdog,
)
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.remote_request import NOTHING
from mlx_engine.remote.wire.messages import Done, decode_from_server, encode
from mlx_engine.remote.wire.values import result_from_wire, result_to_wire
from tests.conftest import ROOT
from tests.processes import children, is_alive
from tests.remote.lives import LONG, NAMED, ends
from tests.remote.test_process_engine import gate, program, stuck
from tests.stuck import StuckModel
from tests.waiting import PATIENCE, PROMPTLY, until, until_now

pytestmark = pytest.mark.anyio

__all__ = ["gate", "stuck"]  # fixtures


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_a_stop_just_after_the_start_began_is_not_lost(stuck: StuckModel, turns: int) -> None:
    engine = ProcessEngine(stuck.path)
    start = asyncio.create_task(engine.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    await engine.stop()  # which does not wait for the load
    with pytest.raises(EngineStopped):
        await start
    assert not children()


async def test_a_name_that_no_process_can_have(tiny_path: Path) -> None:
    for name in ("a\0b", "\ud800", 5):
        with pytest.raises(ValueError, match=r"^name: must be a printable string"):
            ProcessEngine(tiny_path, name=name)  # type: ignore[arg-type]


async def test_no_thread_can_be_started(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ProcessEngine(tiny_path)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    io_thread.call(gc.collect)  # its own thread runs by now
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(EngineDead, match="can't start new thread"):
        await engine.start()
    assert not children()


@pytest.mark.parametrize("kind", ["simple", "batched"])
async def test_a_processor_that_raises_what_cannot_be_written_or_ends_programs(
    tiny_path: Path, kind: Any
) -> None:
    async with ProcessEngine(tiny_path, engine=kind) as engine:
        with pytest.raises(GenerationError, match=r"bad \\ud800 text"):
            await engine.generate("a", logits_processors=[NAMED + "fail_oddly"])
        with pytest.raises(GenerationError, match="SystemExit: 3"):
            await engine.generate("a", logits_processors=[NAMED + "exit_3"])
        with pytest.raises(ValueError, match=r"^stop: is not valid Unicode"):
            await engine.generate("a", stop="\ud800")
        assert (await engine.generate("a", max_tokens=2)).tokens


async def test_an_integer_too_large_to_travel_costs_no_answer(tiny_path: Path) -> None:
    user = [{"role": "user", "content": "hi"}]
    async with ProcessEngine(tiny_path) as engine:
        tool = {"type": "function", "function": {"name": "add"}}
        says = [NAMED + "SayHugeCall"]
        result = await engine.chat(user, tools=[tool], logits_processors=says)
        (call,) = result.tool_calls
        assert call.arguments == {"a": int("9" * 30)}


async def test_an_engine_that_has_failed_is_dead_elsewhere_too(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path, engine="batched") as engine:
        errors = list[MLXEngineError]()
        while engine.state is EngineState.RUNNING:
            with pytest.raises((GenerationError, EngineDead)) as caught:
                await engine.generate("a", logits_processors=[NAMED + "lose_the_device"])
            errors.append(caught.value)
        assert "the device is lost" in str(errors[0])
        assert engine.state is EngineState.FAILED
        health = engine.check_health()
        assert not health.healthy
        assert "its engine has failed" in health.reason
        assert (await engine.wait_exit()).kind == "crash"
        await engine.stop()
        await engine.start()
        assert (await engine.generate("a", max_tokens=2)).tokens


def test_arguments_of_a_call_that_are_no_json_cost_that_call_only() -> None:
    digits = sys.get_int_max_str_digits() + 1
    odd = [{"x": {(1, 2): 3}}, {b"x": 1}, {"x": 16**digits}]
    calls = (*(ToolCall("f", each, "f()") for each in odd), ToolCall("g", {"a": [1]}, "g()"))
    done = result_to_wire(1, replace(NOTHING, tool_calls=calls))
    (told,) = decode_from_server(encode([done]))
    assert isinstance(told, Done)
    *lost, good = result_from_wire(told).tool_calls
    assert good == calls[-1]
    for call in lost:
        assert (call.name, call.arguments, call.raw, call.ok) == ("f", {}, "f()", False)
        assert "its arguments are no JSON" in str(call.error)


async def test_a_late_cancel_of_a_stream_touches_no_other_request(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        stream = engine.stream_generate("a", max_tokens=2)
        async for _ in stream:
            pass
        await engine.stop()
        await engine.start()
        other = asyncio.create_task(engine.generate("b", max_tokens=200, ignore_eos=True))
        await until(lambda: engine._client.connection and engine._client.connection.calls.busy)
        stream.cancel()
        assert (await other).finish_reason == "length"


def test_a_request_whose_loop_was_closed_is_cancelled(tiny_path: Path) -> None:
    engine = ProcessEngine(tiny_path)
    asyncio.run(engine.start())
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate("a", **LONG))
    loop.run_until_complete(until(lambda: engine.stats().completion_tokens))
    loop.close()
    asyncio.run(engine.generate("b", max_tokens=2))
    stats = engine.stats()
    assert (stats.cancelled, stats.finished) == (1, 1)
    asyncio.run(engine.stop())
    task.get_coro().close()
    del task
    gc.collect()


async def test_one_that_writes_without_a_pause_does_not_stop_the_others(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as noisy, ProcessEngine(tiny_path) as other:
        with pytest.raises(GenerationError):
            await noisy.generate("a", logits_processors=[NAMED + "make_noise"])
        for _ in range(3):
            await other.generate("b", max_tokens=3)
        began = time.monotonic()
        noisy.kill()
        await noisy.wait_exit()
        assert time.monotonic() - began < PROMPTLY, "its grandchild holds its standard error"


@pytest.mark.parametrize("blocked", [True, False])
def test_inherited_signal_masks_do_not_matter(tiny_path: Path, gate: Path, blocked: bool) -> None:
    body = f"""
        import signal
        if {blocked}:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

        async def run():
            engine = ProcessEngine({str(tiny_path)!r})
            await engine.start()
            print(engine._client.connection.link.pid, flush=True)
            await engine.generate("a", logits_processors=["{NAMED}hold_the_gil"])

        asyncio.run(run())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program(body, tiny_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    with process:
        pid = int(process.stdout.readline())
        until_now((gate / "inside").exists)
        process.kill()
    asyncio.run(ends(pid))


def test_standard_streams_that_are_closed(tiny_path: Path) -> None:
    body = """
        try:
            asyncio.run(main())
        finally:
            os._exit(0 if "done" in globals() else 1)
    """
    code = program(body, tiny_path).replace(
        "print(len(tokens), flush=True)", "globals()['done'] = 1"
    )
    command = f'{sys.executable} -c "$CODE" 0<&- 1>&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "CODE": code}, cwd=ROOT)
    assert done.returncode == 0


def test_a_fork_that_exits_leaves_the_engine_alone(tiny_path: Path) -> None:
    body = f"""
        engine = ProcessEngine({str(tiny_path)!r})
        asyncio.run(engine.start())
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        print(len(asyncio.run(engine.generate("hello", max_tokens=9)).tokens), flush=True)
        asyncio.run(engine.stop())
    """
    done = subprocess.run(
        [sys.executable, "-c", program(body, tiny_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, "9\n"), done.stderr


@pytest.mark.parametrize("late", ["stop", "generate"])
def test_used_while_the_interpreter_exits(tiny_path: Path, late: str) -> None:
    body = f"""
        import atexit
        loop = asyncio.new_event_loop()
        engine = ProcessEngine({str(tiny_path)!r})

        async def use():
            try:
                await (engine.stop() if {late!r} == "stop" else engine.generate("a"))
            except EngineDead as error:
                print("shutting down" in str(error), flush=True)
            else:
                print(True, flush=True)

        atexit.register(lambda: loop.run_until_complete(use()))
        loop.run_until_complete(engine.start())
        task = loop.create_task(engine.generate("a", max_tokens=9999, ignore_eos=True))
        task.add_done_callback(lambda task: task.exception())
        loop.run_until_complete(asyncio.sleep(0.1))
    """
    source = "from mlx_engine import EngineDead\n" + program(body, tiny_path)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


async def test_a_signal_handler_may_kill_an_engine(tiny_path: Path) -> None:
    engine = ProcessEngine(tiny_path)
    await engine.start()
    before = signal.signal(signal.SIGUSR2, lambda number, frame: engine.kill())
    try:
        for count in range(200):
            engine.stats()
            if count == 100:
                os.kill(os.getpid(), signal.SIGUSR2)
        assert (await engine.wait_exit()).signal == "SIGKILL"
    finally:
        signal.signal(signal.SIGUSR2, before)
        await engine.stop()


async def test_what_is_known_of_a_death_is_told_to_those_who_come_later(tiny_path: Path) -> None:
    async with ProcessEngine(tiny_path) as engine:
        task = asyncio.create_task(engine.generate("a", **LONG))
        await until(lambda: engine.stats().running)
        engine.kill()
        with pytest.raises(EngineDead):
            await task
        with pytest.raises(EngineDead) as caught:
            await engine.generate("b")
        assert (caught.value.exit_code, caught.value.signal) == (-9, "SIGKILL")
        assert engine.stats().running == engine.stats().waiting == engine.stats().batch_size == 0
        assert not engine.check_health().healthy


def test_a_pause_of_both_processes_is_no_stall(tiny_path: Path) -> None:
    """As when a laptop sleeps, or a container is frozen."""
    body = f"""
        from tests.remote.lives import NAMED, pid_of, watch_closely

        async def run():
            async with ProcessEngine({str(tiny_path)!r}) as engine:
                stream = engine.stream_generate(
                    "a", max_tokens=12, ignore_eos=True, logits_processors=[NAMED + "very_slow"]
                )
                await anext(stream)
                await watch_closely(engine, decode=3, silence=3)
                print(pid_of(engine), flush=True)
                print(1 + len([chunk async for chunk in stream]), flush=True)

        asyncio.run(run())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program(body, tiny_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    with process:
        pid = int(process.stdout.readline())
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for one in (pid, process.pid):
                os.kill(one, number)
            if number is signal.SIGSTOP:
                time.sleep(6)
        assert process.stdout.read() == "12\n"


def test_a_manager_whose_loop_is_closed_says_so(tiny_path: Path) -> None:
    manager = EngineManager(tiny_path)

    async def start() -> None:
        await manager.start()

    asyncio.run(start())
    for line in children():
        os.kill(int(line.split()[0]), signal.SIGKILL)
    with pytest.raises(EngineDead):
        asyncio.run(asyncio.wait_for(manager.generate("a"), PATIENCE))
    asyncio.run(manager.stop())
    gc.collect()


async def test_a_manager_that_is_dropped_ends_its_replicas(tiny_path: Path) -> None:
    manager = EngineManager(tiny_path)
    await manager.start()
    (pid,) = [int(line.split()[0]) for line in children()]
    (replica,) = manager._replicas.up()
    gone, engine = weakref.ref(manager), weakref.ref(replica.engine)
    with pytest.warns(ResourceWarning, match="dropped without being stopped"):
        del manager, replica
        gc.collect()
        assert gone() is None
        # The I/O thread may have it for a moment yet, and then it warns as well.
        await until(lambda: gc.collect() >= 0 and engine() is None)
    await ends(pid)
    assert not is_alive(pid)


async def test_odd_entries_of_the_path_of_imports(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, None, b"bytes", "\ud800", ""])
    async with ProcessEngine(tiny_path, watchdog=Watchdog()) as engine:
        assert engine.state is EngineState.RUNNING
    with pytest.raises(ValueError, match="must be seconds"):
        await engine.shutdown(float("nan"))
