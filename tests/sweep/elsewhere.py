"""An engine elsewhere whose other side is here: the wire and all above it, without a process.

The frames, the connection, its watchdog-less deadlines, the requests of the client and the
engine behind it are the real ones; what is missing is the socket and the second interpreter.
Both sides live in the event loop of the I/O thread, which the simulation drives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mlx_engine import BatchedEngine, MLXEngineError, ProcessEngine, SimpleEngine
from mlx_engine.remote.links.link import Ending, Link
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.heartbeats import Heartbeats
from mlx_engine.remote.wire.messages import (
    Configure,
    Hello,
    ProgressUpdate,
    Shutdown,
    Stopped,
    decode_from_client,
)
from mlx_engine.remote.wire.options import options_from_wire
from mlx_engine.remote.wire.outbox import Outbox
from mlx_engine.remote.wire.values import error_to_wire
from mlx_engine.testing.safety.stepped_loop import SteppedLoop

_BEAT = 0.25  # seconds


class Elsewhere(ProcessEngine):
    """A ``ProcessEngine`` whose process is this one."""

    def _make_link(self) -> Callable[[], Link]:
        return HereLink


class HereLink(Link):
    """A link to an engine in the same event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._other: OtherSide | None = None
        self._dying: asyncio.Task[None] | None = None

    async def open(self) -> None:
        try:
            for _ in range(3):  # as it takes a while to start a process
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._gone("it had not been started")
            raise
        if not self.gone.done():
            self._other = OtherSide(lambda frame: self.on_frame(frame), self._ended)

    def send(self, frame: bytes) -> None:
        if self._other is not None and not self.gone.done():
            self._loop.call_soon(self._other.receive, frame)

    async def dump_stacks(self) -> None:
        pass

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self._other is None:
            self._gone("it was killed")
        elif self._dying is None:
            self._dying = asyncio.ensure_future(self._die(self._other))

    async def _die(self, other: OtherSide) -> None:
        await other.die()
        self._gone("it was killed", -9)

    def _ended(self) -> None:
        self._gone("it has ended", 0)

    def _gone(self, detail: str, exit_code: int | None = None) -> None:
        if not self.gone.done():
            self.gone.set_result(Ending(detail, exit_code))


class OtherSide:
    """What the process of an engine does, but for the process."""

    def __init__(self, write: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SteppedLoop)
        self._loop = loop
        self._on_end = on_end
        self._silent = False
        self._outbox = Outbox(lambda payload: loop.call_soon(self._deliver, write, payload))
        self._heartbeats = Heartbeats()
        self._engine: SimpleEngine | BatchedEngine | None = None
        self._requests: ClientRequests | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating = loop.call_later(_BEAT, self._beat)

    def _deliver(self, write: Callable[[bytes], None], payload: bytes) -> None:
        if not self._silent:
            write(payload)

    def receive(self, frame: bytes) -> None:
        for message in decode_from_client(frame):
            match message:
                case Hello():
                    pass
                case Configure():
                    self._spawn(self._start(message))
                case Shutdown():
                    self._spawn(self._shut_down(message.remaining))
                case _:
                    if self._requests is not None and not self._silent:
                        self._requests.take(message)

    async def die(self) -> None:
        """The process is gone, and all that it did with it."""
        self._silent = True
        self._beating.cancel()
        others = self._tasks - {asyncio.current_task()}  # type: ignore[arg-type]
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)
        if self._requests is not None:
            await self._requests.end()
        if self._engine is not None:
            await self._engine.stop()

    async def _start(self, configure: Configure) -> None:
        kind = {"simple": SimpleEngine, "batched": BatchedEngine}[configure.kind]
        options: dict[str, Any] = options_from_wire(configure.options)
        self._engine = kind(
            configure.model,
            on_progress=lambda p: self._outbox.put(ProgressUpdate(0, p.phase, p.done, p.total)),
            **options,
        )
        try:
            await self._engine.start()
        except MLXEngineError as error:
            self._outbox.put(error_to_wire(0, error))
            self._outbox.flush()
            return
        self._requests = ClientRequests(
            self._engine, self._outbox, trusted=True, on_over=self._heartbeats.step
        )
        self._heartbeats.clients.add(self._requests)
        self._heartbeats.engine = self._engine
        self._outbox.put(self._requests.welcome())

    async def _shut_down(self, remaining: float | None) -> None:
        assert self._engine is not None
        assert self._requests is not None
        report = await self._engine.shutdown(remaining)
        await self._requests.over()
        self._beating.cancel()
        self._outbox.put(Stopped(report))
        self._outbox.flush()
        self._loop.call_soon(self._loop.call_soon, self._on_end)  # after what was said

    def _beat(self) -> None:
        self._outbox.put(self._heartbeats.heartbeat())
        self._beating = self._loop.call_later(_BEAT, self._beat)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
