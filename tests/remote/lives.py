"""The processes of engines: which they are, what they do, and whether they live."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import Watchdog
from mlx_engine.remote import connection
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.links import process_link
from tests.processes import is_alive
from tests.waiting import PATIENCE, until

NAMED = "tests.remote.processors:"
LONG: dict[str, Any] = {"max_tokens": 5000, "ignore_eos": True}


def process_of(engine: LinkedEngine) -> int | None:
    """The id of its process, once there is one."""
    link = None if engine._client.connection is None else engine._client.connection.link
    pid: int | None = getattr(link, "pid", None)
    return pid


def pid_of(engine: LinkedEngine) -> int:
    pid = process_of(engine)
    assert pid is not None
    return pid


async def ends(pid: int) -> None:
    await until(lambda: not is_alive(pid), f"process {pid} is still there")


async def appears(path: Path) -> None:
    await until(path.exists, f"{path.name} does not appear")


async def watch_closely(engine: LinkedEngine, **limits: Any) -> None:
    """From now on its watchdog has these limits.

    For an engine that is stuck by now: while they start and work, those on a busy machine may
    take as long as that.
    """
    watched = engine._client.connection
    assert watched is not None
    narrow = Watchdog(**{"start": None, "prefill": None, "decode": None, "silence": None} | limits)

    async def watch() -> None:
        assert watched._watch is not None
        assert watched.link is not None
        watched._watch.cancel()
        watched._watch = asyncio.create_task(watched._watch_over(watched.link, narrow))

    await io_thread.run(watch)


def have_patience(patch: pytest.MonkeyPatch) -> None:
    """Processes that are asked to end, or to say where they are, may take their time to do so."""
    patch.setattr(connection, "_TERMINATE_AFTER", PATIENCE)
    patch.setattr(connection, "_KILL_AFTER", PATIENCE)
    patch.setattr(process_link, "_DUMP", 1.0)
