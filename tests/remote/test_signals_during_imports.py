"""Signals that come before a program has imported what it needs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_engine import EngineDead, EngineState, ProcessEngine
from tests.conftest import ROOT
from tests.imports import HeldImport
from tests.processes import children
from tests.remote.hosting import until

pytestmark = pytest.mark.anyio

LIMIT = 40  # seconds for a process to come there, on a busy machine

COMMANDS = {
    "host": ["host", "demo", "--socket", "nowhere"],
    "generate": ["generate", "hello"],
    "chat": ["chat"],
    "info": ["info", "demo"],
}


def _started(arguments: list[str], held: HeldImport) -> subprocess.Popen[bytes]:
    # A shell that runs the tests in the background would have their children ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_engine", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": held.path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("module", ["argparse", "anyio", "mlx"])
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("host", signal.SIGTERM, 0),
        ("host", signal.SIGINT, 130),
        ("generate", signal.SIGINT, 130),
        ("generate", signal.SIGTERM, -signal.SIGTERM),
        ("chat", signal.SIGINT, 130),
        ("info", signal.SIGINT, 130),
    ],
)
async def test_a_command_that_is_importing_ends_with_its_exit_code(
    tmp_path: Path, module: str, command: str, number: signal.Signals, code: int
) -> None:
    held = HeldImport(tmp_path, module)
    with _started(COMMANDS[command], held) as process:
        try:
            async with asyncio.timeout(LIMIT):
                await asyncio.to_thread(held.reach)
                process.send_signal(number)
                assert await asyncio.to_thread(process.wait) == code
        finally:
            held.go()
            process.kill()
        assert process.stdout is not None
        assert process.stderr is not None
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


async def _importing(engine: ProcessEngine, held: HeldImport) -> tuple[asyncio.Task[None], int]:
    """A start whose process stands in its imports, and the id of that process."""
    start = asyncio.create_task(engine.start())
    await asyncio.to_thread(held.reach)
    connection = engine._client.connection
    assert connection is not None
    pid = connection.link.pid  # type: ignore[union-attr]
    assert isinstance(pid, int)
    return start, pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
async def test_signals_that_are_not_for_it_do_not_end_a_process_that_is_importing(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    held, engine = HeldImport(tmp_path, "anyio"), ProcessEngine(tiny_path)
    monkeypatch.setenv("PYTHONPATH", held.path)
    async with asyncio.timeout(LIMIT):
        start, pid = await _importing(engine, held)
        os.kill(pid, number)
        held.go()
        await start
        assert len((await engine.generate("a", max_tokens=3, ignore_eos=True)).tokens) == 3
        await engine.stop()


@pytest.mark.parametrize(
    ("way", "said"), [("SIGTERM", "ended by SIGTERM"), ("SIGKILL", "ended by SIGKILL")]
)
async def test_a_process_that_is_ended_while_it_imports_is_told_at_once(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, said: str
) -> None:
    held, engine = HeldImport(tmp_path, "anyio"), ProcessEngine(tiny_path)
    monkeypatch.setenv("PYTHONPATH", held.path)
    async with asyncio.timeout(LIMIT):
        start, pid = await _importing(engine, held)
        os.kill(pid, signal.Signals[way])
        with pytest.raises(EngineDead, match=said) as failed:
            await start
        held.go()
        assert failed.value.stderr == ""
        assert engine.state is EngineState.CREATED
        await until(lambda: not children())
