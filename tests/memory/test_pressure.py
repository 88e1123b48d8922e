"""Pressure: stages that come one by one, and end again by themselves."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_engine import BatchedEngine, SimpleEngine
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.pressure import (
    Level,
    LinuxPressure,
    PressureWatch,
    admits,
    next_stage,
)
from mlx_engine.memory_stats import PressureStage
from tests.conftest import on_mlx_thread, settled
from tests.memory.machines import machine_of
from tests.memory.test_machine import system
from tests.waiting import until

pytestmark = pytest.mark.anyio

LEVELS: list[Level] = ["normal", "warning", "critical"]
GIB = 2**30


@pytest.fixture(autouse=True)
def nobody_else_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of this process would say once a second that all is well."""
    monkeypatch.setattr("mlx_engine.core.pressure.WATCH.look", lambda: None)


class Told:
    """A source that says what a test has told it."""

    def __init__(self, level: Level = "normal") -> None:
        self.said: Level = level

    def level(self) -> Level:
        return self.said


def stages(levels: list[Level]) -> list[PressureStage]:
    stage: PressureStage = "none"
    found = []
    for level in levels:
        stage = next_stage(stage, level)
        found.append(stage)
    return found


def test_stages_come_one_by_one_and_end_again() -> None:
    told: list[Level] = ["warning"] * 4 + ["critical"] * 2 + ["normal"] * 4
    assert stages(told) == [
        *["shrink", "clear", "clear", "clear"],
        *["stop", "stop"],
        *["clear", "shrink", "none", "none"],
    ]


@given(st.lists(st.sampled_from(LEVELS)))
def test_whatever_happened_three_quiet_looks_end_it(levels: list[Level]) -> None:
    assert stages([*levels, "normal", "normal", "normal"])[-1] == "none"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "normal"),
        ({"proc__pressure__memory": "some avg10=25.00 avg60=1\nfull avg10=0.00 a=1\n"}, "warning"),
        (
            {"proc__pressure__memory": "some avg10=40.00 avg60=1\nfull avg10=12.00 a=1\n"},
            "critical",
        ),
        ({"proc__pressure__memory": "nothing that makes sense"}, "normal"),
        (
            {
                "proc__pressure__memory": "some avg10=40.00 a=1\nfull avg10=12.00 a=1\n",
                "sys__fs__cgroup__memory.pressure": "some avg10=0.00 a=1\nfull avg10=0.00 a=1\n",
            },
            "normal",
        ),
        ({"proc__meminfo": "MemTotal: 1000 kB\nMemAvailable: 40 kB\n"}, "warning"),
        ({"proc__meminfo": "MemTotal: 1000 kB\nMemAvailable: 10 kB\n"}, "critical"),
        ({"proc__meminfo": "MemTotal: 1000 kB\nMemAvailable: 10 kB\nSwapFree: 90 kB\n"}, "normal"),
    ],
)
def test_linux_tells_by_waiting_and_by_what_is_available(
    tmp_path: Path, files: dict[str, str], expected: Level
) -> None:
    system(tmp_path, **files)
    assert LinuxPressure(tmp_path).level() == expected


async def test_stored_prompts_shrink_and_come_back(
    tiny_path: Path, engine_type: type[SimpleEngine], caplog: pytest.LogCaptureFixture
) -> None:
    source = Told()
    watch = PressureWatch(source)
    with machine_of(GIB), caplog.at_level(logging.INFO, "mlx_engine"):
        async with engine_type(tiny_path, prefill_step_size=16) as engine:
            for n in range(8):
                await engine.generate([n + 1] * 40, max_tokens=1)
            await until(lambda: engine.stats().prompt_cache.entries == 8, "they are not stored")
            source.said = "warning"
            watch.look()
            await until(lambda: engine.stats().prompt_cache.entries == 4, "nothing is dropped")
            assert engine.stats().memory.stage == "shrink"
            watch.look()
            await until(lambda: engine.stats().prompt_cache.entries <= 2, "nothing is dropped")
            assert engine.stats().memory.stage == "clear"
            left = engine.stats().prompt_cache.entries
            await engine.generate([99] * 40, max_tokens=1)
            await settled()
            assert engine.stats().prompt_cache.entries == left, "nothing more is stored"
            source.said = "normal"
            for _ in range(3):
                watch.look()
            assert engine.stats().memory.stage == "none"
            await engine.generate([98] * 40, max_tokens=1)
            await settled()
            assert engine.stats().prompt_cache.entries > left
    said = [record.getMessage() for record in caplog.records if "pressure" in record.getMessage()]
    assert said == [
        "memory pressure: shrink, after none",
        "memory pressure: clear, after shrink",
        "memory pressure: shrink, after clear",
        "memory pressure: none, after shrink",
    ]


async def test_relief_comes_while_a_request_is_in_work(
    tiny_path: Path, engine_type: type[SimpleEngine]
) -> None:
    watch = PressureWatch(Told("warning"))
    with machine_of(GIB):
        async with engine_type(tiny_path) as engine:
            for n in range(4):
                await engine.generate([n + 1] * 40, max_tokens=1)
            async with engine.stream_generate([7] * 40, max_tokens=500, ignore_eos=True) as stream:
                await anext(stream)
                watch.look()
                async for _ in stream:
                    if engine.stats().prompt_cache.entries < 4:
                        break
            assert engine.stats().prompt_cache.entries <= 3


async def test_a_batch_takes_up_no_more_and_nobody_is_aborted(tiny_path: Path) -> None:
    source = Told("critical")
    watch = PressureWatch(source)
    with machine_of(GIB) as book:
        async with BatchedEngine(tiny_path) as engine:
            for _ in range(3):
                watch.look()
            assert engine.stats().memory.stage == "stop"
            first = engine.stream_generate([5] * 40, max_tokens=16000, ignore_eos=True)
            await anext(first)
            second = engine.stream_generate([6] * 40, max_tokens=300, ignore_eos=True)
            waiting = asyncio.ensure_future(anext(second))
            await until(lambda: engine.stats().waiting == 1, "it does not wait")
            for _ in range(30):
                await anext(first)
            assert engine.stats().waiting == 1
            assert not waiting.done()
            source.said = "normal"
            for _ in range(3):
                watch.look()
            assert book.stage == "none"
            assert (await waiting).tokens
            assert engine.stats().running == 2, "beside the first one"
            await first.aclose()
            async for _ in second:
                pass
            assert second.result.finish_reason == "length"


async def test_one_at_a_time_is_served_however_long_it_lasts(tiny_path: Path) -> None:
    watch = PressureWatch(Told("critical"))
    with machine_of(GIB):
        async with BatchedEngine(tiny_path) as engine:
            for _ in range(3):
                watch.look()
            results = await engine.generate_batch([[n] * 20 for n in range(1, 6)], max_tokens=5)
            assert [len(result.tokens) for result in results]
            assert engine.stats().finished == 5


@on_mlx_thread
def test_a_batch_admits_when_it_is_empty() -> None:
    with machine_of(GIB) as book:
        book.stage = "stop"
        assert admits(book, 0)
        assert not admits(book, 1)
        book.stage = "clear"
        assert admits(book, 1)
    assert mlx_thread.is_current()


async def test_the_watch_ends_with_the_last_engine(tiny_path: Path, monkeypatch: Any) -> None:
    watch = PressureWatch(Told("warning"), 0.005)
    monkeypatch.setattr("mlx_engine.core.pressure.WATCH", watch)
    with machine_of(GIB) as book:
        async with SimpleEngine(tiny_path) as engine:
            await until(lambda: engine.stats().memory.stage == "clear", "nobody looks")
        await until(lambda: not watch._watching, "it goes on looking")
        assert book.stage == "none"
