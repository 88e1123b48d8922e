"""What is on its way out waits for company, unless somebody waits for it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mlx_engine.remote.wire import outbox
from mlx_engine.remote.wire.messages import (
    CacheFileDone,
    Chunk,
    ErrorReply,
    Heartbeat,
    ProgressUpdate,
    decode_from_server,
)
from mlx_engine.remote.wire.outbox import Outbox
from tests.waiting import turns

pytestmark = pytest.mark.anyio


def chunk(text: str) -> Chunk:
    return Chunk(1, text, (1,), "content", (), None)


@pytest.fixture
def frames() -> list[list[object]]:
    return []


@pytest.fixture
async def out(frames: list[list[object]], monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """With a gap between frames that never ends."""
    monkeypatch.setattr(outbox, "_GAP", 1e6)
    return Outbox(lambda payload: frames.append(list(decode_from_server(payload))))


async def first_frame(out: Outbox, frames: list[list[object]]) -> None:
    out.put(chunk("first"))
    out.flush()
    assert frames == [[chunk("first")]]
    frames.clear()


@pytest.mark.parametrize(
    "message", [chunk("x"), ProgressUpdate(1, "prefill", 1, 2), Heartbeat(phase="idle")]
)
async def test_a_part_waits_for_company(
    out: Outbox, frames: list[list[object]], message: object
) -> None:
    await first_frame(out, frames)
    out.put(message)
    out.put(message)
    await turns()
    assert frames == []
    out.flush()
    assert frames == [[message, message]]


@pytest.mark.parametrize(
    "message", [CacheFileDone(1, 2), ErrorReply(1, "EngineBusy", "busy", {}, None)]
)
async def test_an_ending_goes_at_once_and_takes_along_what_waits(
    out: Outbox, frames: list[list[object]], message: object
) -> None:
    await first_frame(out, frames)
    out.put(chunk("a"))
    await turns()
    out.put_last(lambda: Heartbeat(phase="idle"))
    thread = threading.Thread(target=out.put, args=(message,))
    thread.start()
    await asyncio.to_thread(thread.join)
    await turns()
    assert frames == [[chunk("a"), message, Heartbeat(phase="idle")]]
    frames.clear()
    out.put(chunk("b"))  # which has to wait again, and has no old timer that would send it
    await turns()
    assert frames == []


async def test_what_waits_goes_when_the_gap_is_over(
    out: Outbox, frames: list[list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await first_frame(out, frames)
    monkeypatch.setattr(outbox, "_GAP", 0.0)
    out.put(chunk("a"))
    await turns()
    assert frames == [[chunk("a")]]
