"""One stay of a model in memory: from the wish for it to the end of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mlx_engine.engine.interface import Engine
from mlx_engine.outputs import EngineState


class Stay:
    """A model that is in memory, or on its way there or out.

    Args:
        live: makes, starts and stops the engine; a task of its own, which outlives requests.

    Attributes:
        engine: once that has started.
        users: requests that have the engine, or wait for it.
        used: when there was a user last, by the clock of the event loop.
        up: set when the engine has started, or will not.
        gone: set when nothing of it is left.
        error: why it did not start.
        leaving: whether it takes no more users.
        task: does ``live``.
    """

    def __init__(self, live: Callable[[Stay], Awaitable[None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.engine: Engine | None = None
        self.users = 0
        self.used = self._loop.time()
        self.up = asyncio.Event()
        self.gone = asyncio.Event()
        self.error: Exception | None = None
        self.leaving = False
        self.task = asyncio.ensure_future(live(self))

    @property
    def state(self) -> str:
        """In a word."""
        return "loading" if self.engine is None else str(self.engine.state)

    @property
    def spent(self) -> bool:
        """Whether nobody can use it any more: its engine has failed, or somebody stopped it."""
        return self.leaving or (
            self.engine is not None and self.engine.state is not EngineState.RUNNING
        )

    def join(self) -> None:
        """Have one more user."""
        self.users += 1

    def release(self) -> None:
        """Have one less. A load goes on without: who comes back soon, as agents do, finds it."""
        self.users -= 1
        self.used = self._loop.time()
        if not self.users:
            self._changed.set()
            if self.leaving:
                self._give_up()

    def leave(self) -> None:
        """Take no more users, and end when those that are there have ended. Any number of times."""
        self.leaving = True
        self._changed.set()
        if not self.users:
            self._give_up()

    def _give_up(self) -> None:
        """End a load that nobody waits for."""
        if not self.up.is_set():
            self.task.cancel()

    async def unused(self, idle: float | None) -> None:
        """Wait until it has no users and is to leave, or had none for ``idle`` seconds."""
        while True:
            self._changed.clear()
            left = None
            if not self.users:
                if self.leaving:
                    return
                if idle is not None and (left := self.used + idle - self._loop.time()) <= 0:
                    self.leaving = True
                    return
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                pass
