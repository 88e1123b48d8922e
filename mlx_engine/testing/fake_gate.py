"""A place in a script where a test holds the work."""

from __future__ import annotations

import threading

from mlx_engine.core.wakeup import Broadcast


class Gate:
    """Stands among the pieces of a ``FakeAnswer``, or of a load, and holds the work there.

        gate = Gate()
        async with FakeEngine(["Once", gate, " upon"]) as engine:
            task = asyncio.create_task(engine.generate("Tell me a story"))
            await gate.reached()  # one token has been made, no other is on its way
            task.cancel()

    A gate is closed until it is opened, and stays open. A request that is cancelled, or whose
    engine is stopped, ends there at once. Use it with any number of requests, from any thread.

    Args:
        firm: hold those as well that are cancelled, like a step of a real model that takes
            long: their callers stay until the gate is opened.
    """

    def __init__(self, *, firm: bool = False) -> None:
        self._firm = firm
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._arrived = 0
        self._changed = Broadcast()

    @property
    def is_open(self) -> bool:
        """Whether it lets everyone pass."""
        return self._open.is_set()

    def open(self) -> None:
        """Let everyone pass, now and later. From any thread."""
        self._open.set()

    async def reached(self, times: int = 1) -> None:
        """Wait until the work has come to it so many times, all requests together."""
        while True:
            with self._lock:
                if self._arrived >= times:
                    return
                changed = self._changed.watch()
            await self._changed.wait(changed)

    def arrive(self) -> None:
        """The work has come to it. On the engine's thread."""
        with self._lock:
            self._arrived += 1
            self._changed.notify()

    def holds(self, stopping: bool) -> bool:
        """Whether work stays at it that should stop, or should not. On the engine's thread."""
        return not self._open.is_set() and (self._firm or not stopping)
