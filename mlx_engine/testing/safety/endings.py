"""The ends of an event loop: of all tasks at once, and without a word to anybody."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from mlx_engine.testing.safety.ways import WAYS, Way, Work


class LoopShutdown(Way[Any]):
    """The event loop ends as ``asyncio.run`` ends it: whoever runs it then cancels all tasks."""

    name = "loop shutdown"
    closes: ClassVar[bool] = False

    async def run(self, operation: Work[Any]) -> Any:
        """See ``Way``."""
        self._inner = asyncio.current_task()
        try:
            return await operation()
        finally:
            self._inner = None

    def _strike(self) -> None:
        asyncio.get_running_loop().stop()


class LoopClosed(LoopShutdown):
    """The event loop is stopped and closed: nobody in it is ever told anything."""

    name = "loop closed"
    closes = True


ALL_WAYS: tuple[type[Way[Any]], ...] = (*WAYS, LoopShutdown, LoopClosed)
