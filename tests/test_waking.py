"""Waking waiters together: once for each event loop, however blocks are nested."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mlx_engine.core.wakeup import Broadcast, wake, waking_together
from tests.waiting import PATIENCE

pytestmark = pytest.mark.anyio


async def test_wakes_within_nested_blocks_wait_for_the_end_of_the_outer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(3)]
    calls: list[Callable[..., Any]] = []
    soon = loop.call_soon_threadsafe

    def noted(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
        calls.append(func)
        return soon(func, *args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", noted)
    with waking_together():
        wake(futures[0])
        with waking_together():
            wake(futures[1])
        assert not calls, "the inner block has woken"
        wake(futures[2])
        assert not calls, "the outer block waits no more"
    assert len(calls) == 1
    await asyncio.wait_for(asyncio.gather(*futures), PATIENCE)


async def test_a_nested_block_that_raises_leaves_the_outer_one_as_it_was() -> None:
    future = asyncio.get_running_loop().create_future()
    with waking_together():
        with pytest.raises(LookupError), waking_together():
            raise LookupError
        wake(future)
        await asyncio.sleep(0)
        assert not future.done()
    await asyncio.wait_for(future, PATIENCE)


async def test_a_broadcast_wakes_in_the_order_of_arrival_and_forgets_who_has_left() -> None:
    changed, woken = Broadcast(), []

    async def waits(number: int) -> None:
        await changed.wait(changed.watch())
        woken.append(number)

    tasks = [asyncio.create_task(waits(number)) for number in range(20)]
    await asyncio.sleep(0)
    tasks[7].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks.pop(7)
    changed.notify()
    assert not changed
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*tasks)
    assert woken == [number for number in range(20) if number != 7]
