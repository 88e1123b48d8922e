"""MLX is imported when an engine starts, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.imports import HeldImport
from tests.waiting import PATIENCE

NAMES = """
import asyncio, sys, threading
import mlx_engine, mlx_engine.testing
from mlx_engine import *
from mlx_engine.testing import *

def loaded():
    return sorted({"mlx", "mlx_lm", "transformers", "huggingface_hub"} & set(sys.modules))
"""

NOT_STARTED = """
engines = SimpleEngine("demo"), BatchedEngine("demo"), ProcessEngine("demo")
async def main():
    async with FakeEngine("Hi") as fake:
        print((await fake.generate("Hello")).text)
    for engine in engines:
        try:
            async with engine.stream_generate("Hello") as stream:
                await anext(stream)
        except EngineNotStarted:
            print(engine.state, engine.stats().finished, engine.has_chat_template)
        await engine.stop()
asyncio.run(main())
print(loaded())
"""

CANCELLED = """
async def main():
    engine = {engine}({path!r})
    start = asyncio.create_task(engine.start())
    while "mlx_lm" not in sys.modules:
        await asyncio.sleep(0.001)
    for _ in range(3):
        start.cancel()
        await asyncio.sleep(0.01)
    print(engine.state, start.done(), flush=True)
    await asyncio.wait([start])
    print(engine.state, start.cancelled(), engine._holder.loaded, flush=True)
    async with engine:
        print(len((await engine.generate([1, 2], max_tokens=3, ignore_eos=True)).tokens))
asyncio.run(main())
"""

STOPPED = """
async def main():
    engine = {engine}({path!r})
    start = asyncio.create_task(engine.start())
    while "mlx_lm" not in sys.modules:
        await asyncio.sleep(0.001)
    stop = asyncio.create_task(engine.stop())
    await asyncio.sleep(0.01)
    print(engine.state, start.done(), flush=True)
    print(repr(await asyncio.gather(start, stop, return_exceptions=True)), engine.state)
asyncio.run(main())
"""

MISSING = """
async def main():
    for engine in (SimpleEngine("demo"), BatchedEngine("demo")):
        for _ in range(2):
            try:
                await engine.start()
            except ModelLoadError as error:
                print(error)
            print(engine.state)
asyncio.run(main())
"""


def _program(body: str, **names: object) -> list[str]:
    return [sys.executable, "-c", NAMES + body.format(**names)]


def _output(command: list[str], path: Path | None = None) -> list[str]:
    paths = [str(path) if path else "", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_name_and_an_engine_that_has_not_started_come_without_mlx() -> None:
    assert _output(_program(NOT_STARTED)) == ["Hi", *["created 0 False"] * 3, "[]"]


@pytest.mark.parametrize("engine", ["SimpleEngine", "BatchedEngine"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (CANCELLED, ["starting False", "created True False", "3"]),
        (
            STOPPED,
            [
                "draining False",
                "[EngineStopped('the engine was stopped while this was in flight'), "
                "ShutdownReport(finished=(), aborted=())] stopped",
            ],
        ),
    ],
    ids=["cancelled", "stopped"],
)
def test_the_event_loop_goes_on_while_mlx_is_imported(
    tiny_path: Path, tmp_path: Path, engine: str, body: str, said: list[str]
) -> None:
    """Whoever starts the engine stays until the import is over, and nothing is left behind."""
    held = HeldImport(tmp_path, "mlx_lm")
    with subprocess.Popen(
        _program(body, engine=engine, path=str(tiny_path)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": held.path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            held.reach()
            first = process.stdout.readline().rstrip("\n")
            held.go()
            rest, errors = process.communicate(timeout=PATIENCE)
        finally:
            held.go()
            process.kill()
    assert [first, *rest.splitlines()] == said, errors
    assert process.returncode == 0, errors


@pytest.mark.parametrize("module", ["mlx", "mlx_lm"])
def test_without_mlx_a_start_says_what_to_install(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}')")
    lines = _output(_program(MISSING), tmp_path)
    assert lines[1::2] == ["created"] * 4
    for line in lines[::2]:
        assert f"MLX cannot be used here (ModuleNotFoundError: No module named {module})" in line
        assert "pip install" in line
        assert "FakeEngine" in line


def test_without_mlx_a_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "mlx.py").write_text("raise ModuleNotFoundError('No module named mlx')")
    for command in ("generate", "info", "chat", "host", "selftest"):
        options = {"info": ["demo"], "host": ["demo", "--socket", "x"], "generate": ["Hi"]}
        done = subprocess.run(
            [sys.executable, "-m", "mlx_engine", command, *options.get(command, [])],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
            },
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        assert "MLX cannot be used here" in done.stderr
        assert "Traceback" not in done.stderr
