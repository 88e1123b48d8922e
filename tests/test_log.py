"""The log: what engines and requests do, without what they are asked and answer."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_engine import EngineDead, GenerationError
from mlx_engine.testing import FakeEngine, Gate
from tests.conftest import ROOT
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio

SECRET = "a secret"


async def _some_requests(engine: FakeEngine, gate: Gate) -> None:
    await engine.generate(f"{SECRET} question")
    async with engine.stream_chat([{"role": "user", "content": SECRET}]) as stream:
        async for _ in stream:
            pass
    task = asyncio.create_task(engine.generate(f"{SECRET} that waits"))
    await gate.reached()
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(GenerationError):
        await engine.generate(f"{SECRET} that fails")


def _script(gate: Gate) -> dict[str, object]:
    return {
        f"{SECRET} question": f"{SECRET} answer",
        SECRET: f"another {SECRET}",
        f"{SECRET} that waits": ["one", gate],
        f"{SECRET} that fails": [SECRET, ValueError(SECRET)],
    }


def _lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    records = [record for record in caplog.records if record.levelno == level]
    assert {record.name for record in records} <= {"mlx_engine"}
    return [re.sub(r"\d+\.\d+ s", "N s", record.getMessage()) for record in records]


@pytest.mark.parametrize("batch", [None, 4])
async def test_starts_ends_and_stops_are_in_the_log(
    caplog: pytest.LogCaptureFixture, batch: int | None
) -> None:
    caplog.set_level(logging.DEBUG, "mlx_engine")
    gate = Gate()
    async with FakeEngine(_script(gate), max_batch_size=batch) as engine:
        await _some_requests(engine, gate)
    assert _lines(caplog, logging.INFO) == [
        "FakeEngine of 'fake' has started, in N s",
        "FakeEngine of 'fake' has stopped; of those in flight then 0 finished, 0 aborted",
    ]
    assert _lines(caplog, logging.DEBUG) == [
        "req-1: stop, 4 tokens after 3 (0 of them cached), N s",
        "req-2: stop, 4 tokens after 4 (0 of them cached), N s",
        "req-3: cancelled, N s",
        "req-4: GenerationError, N s",
    ]
    assert SECRET not in caplog.text


async def test_requests_are_not_told_unless_somebody_listens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mlx_engine")
    gate = Gate()
    async with FakeEngine(_script(gate)) as engine:
        await _some_requests(engine, gate)
    assert len(caplog.records) == 2
    assert logging.getLogger("mlx_engine").handlers == []


async def test_the_death_of_an_engine_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_engine")
    engine = FakeEngine()
    await engine.start()
    engine.die(EngineDead("out of power"))
    await engine.stop()
    assert "FakeEngine of 'fake' has failed: out of power" in _lines(caplog, logging.INFO)


PROGRAM = """
import asyncio, logging
from mlx_engine import {engine}
logging.basicConfig(level="DEBUG", format="%(name)s %(levelname)s %(message)s")
async def main():
    async with {engine}({path!r}) as engine:
        await engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("engine", ["SimpleEngine", "ProcessEngine"])
def test_each_line_comes_once_wherever_the_engine_is(tiny_path: Path, engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(engine=engine, path=str(tiny_path))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "mlx_engine " in line]
    said = [line.split(",")[0].split(";")[0] for line in lines]
    name = engine if engine == "SimpleEngine" else "ProcessEngine engine-1"
    of = f"mlx_engine INFO {name} of {str(tiny_path)!r} has"
    assert said == [f"{of} started", "mlx_engine DEBUG req-1: length", f"{of} stopped"]
    assert done.stderr.count("has started") == 1
