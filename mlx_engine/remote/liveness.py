"""The liveness of an engine elsewhere: its heartbeats, and the watchdog that waits for them."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from mlx_engine.remote.links.link import Link
from mlx_engine.remote.wire.heartbeat import Watchdog, judge
from mlx_engine.remote.wire.messages import Heartbeat

_LATE = 0.05  # seconds that a watchdog's own sleep may be late

_log = logging.getLogger("mlx_engine.remote")


class Liveness:
    """The signs of life over one connection. In the I/O loop; read from any thread.

    Attributes:
        heartbeat: the latest.
        last_beat: when it came, or another sign of life, by ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self.last_beat = time.monotonic()
        self._heard = False

    def seen(self) -> None:
        """Note a sign of life."""
        self.last_beat = time.monotonic()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Note a heartbeat: there has to be one again and again from now on."""
        self.heartbeat, self._heard = heartbeat, True
        self.seen()

    async def watch(self, name: str, link: Link, limits: Watchdog) -> str | None:
        """Watch over the engine until it is to be killed; the verdict, or ``None`` if it is gone.

        Args:
            name: of the engine, for the log.
        """
        tick, reported = limits.tick, False
        before_the_first_beat = replace(limits, silence=None)
        while not link.gone.done():
            began = time.monotonic()
            await asyncio.sleep(tick)
            late = time.monotonic() - began - tick
            if late > max(tick, _LATE):  # it is we who were stopped, or had no processor
                self.last_beat = min(time.monotonic(), self.last_beat + late)
                continue
            valid = limits if self._heard else before_the_first_beat
            verdict = judge(time.monotonic(), self.last_beat, self.heartbeat, valid)
            if verdict is not None and limits.action == "kill":
                return verdict
            if verdict is not None and not reported:
                _log.warning("%s: %s", name, verdict)
                await link.dump_stacks()  # they go to the log of what the process says
            reported = verdict is not None
        return None
