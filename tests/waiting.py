"""Waiting for what must come, however busy the machine is.

No test measures how fast a machine is: what is to happen is waited for by the event itself, and
the limits here only end a test that waits for what will never come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE = 90.0  # seconds after which what has not come is not going to
PROMPTLY = 30.0  # seconds: "at once", where the alternative takes a minute or is for ever
LOOK = 0.001  # seconds between two looks at what nobody tells


async def until(
    condition: Callable[[], object],
    what: str = "it has not come to pass",
    limit: float = PATIENCE,
) -> None:
    """Wait for what no event tells."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(LOOK)


def until_now(
    condition: Callable[[], object],
    what: str = "it has not come to pass",
    limit: float = PATIENCE,
) -> None:
    """The same where there is no event loop, or where it is not to go on meanwhile."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(LOOK)


async def turns(count: int = 20) -> None:
    """Let the event loop do what it has to do already, and what follows from that."""
    for _ in range(count):
        await asyncio.sleep(0)


async def expire(limit: asyncio.Timeout, happened: Callable[[], object]) -> None:
    """Let a time limit be over once something has happened."""
    await until(happened)
    limit.reschedule(asyncio.get_running_loop().time())
