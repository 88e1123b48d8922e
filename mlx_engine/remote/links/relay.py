"""The actor that hosts a link to a child, for ``RayLink``. Ray imports it on the node.

An actor method cannot push: the other side always has one call of ``receive`` waiting, which is
answered when there is something to tell.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mlx_engine.core.machine import ToldMachine, this_machine
from mlx_engine.errors import MLXEngineError
from mlx_engine.remote.links.link import Ending, Link
from mlx_engine.remote.wire.frames import FrameSplitter, framed

# An answer costs half a millisecond whatever its size, so frames travel together: the first one
# after a pause at once, the next when there are so many or so much time (seconds) has passed.
GATHER_FRAMES: Final = 8
GATHER_TIME: Final = 0.010
# Larger ones (100 KiB) do not travel in the call but in the object store, which takes longer.
BATCH_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """The place where the actor of a link runs.

    Attributes:
        host: the name of the machine.
        pid: the actor's process there.
        machine: the memory that there was when it was placed.
    """

    host: str
    pid: int
    machine: ToldMachine = field(default_factory=ToldMachine)


def batches(frames: Sequence[bytes]) -> Iterator[bytes]:
    """Batches of at most ``BATCH_BYTES``, or of one frame, as few as there can be."""
    batch: list[bytes] = []
    size = 0
    for frame in frames:
        if batch and size + len(frame) > BATCH_BYTES:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(frame)
        size += len(frame)
    if batch:
        yield b"".join(batch)


class Gatherer:
    """Gathers frames, so that they travel together and yet soon."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._closed = False
        self._changed = asyncio.Event()
        self._last = float("-inf")

    def put(self, frame: bytes) -> None:
        """Add a frame."""
        self._frames.append(framed(frame))
        self._changed.set()

    def close(self) -> None:
        """No more frames will come."""
        self._closed = True
        self._changed.set()

    async def take(self) -> list[bytes]:
        """The frames that are due, once there are any; none when it is closed and empty."""
        while not self._frames and not self._closed:
            await self._change()
        while self._may_wait and (left := self._last + GATHER_TIME - time.monotonic()) > 0:
            await self._change(left)
        self._last = time.monotonic()
        frames, self._frames = self._frames, []
        return frames

    @property
    def _may_wait(self) -> bool:
        return len(self._frames) < GATHER_FRAMES and not self._closed

    async def _change(self, timeout: float | None = None) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            pass


class Relay:
    """The actor: hosts the link to the child, in the event loop of its own that Ray gives it.

    Nothing here needs the main thread of the actor's process, which Ray keeps for itself.
    """

    def __init__(self, name: str, hosted: type[Link], env_vars: Mapping[str, str]) -> None:
        self._name = name
        self._hosted = hosted
        self._link: Link | None = None
        self._gatherer = Gatherer()
        self._batches: deque[bytes] = deque()
        self._waiting: dict[int, bytes] = {}
        self._next = 0
        self._splitter = FrameSplitter()
        # The child inherits them. Ray's own env_vars would need an agent to make an environment.
        os.environ.update(env_vars)

    async def place(self) -> Place:
        """The place where this is."""
        return Place(platform.node(), os.getpid(), ToldMachine.of(this_machine()))

    async def open(self) -> Ending | None:
        """Start the child; an ``Ending`` if that cannot be done."""
        link = self._link = self._hosted(self._name)  # type: ignore[call-arg]
        link.on_frame = self._gatherer.put
        link.gone.add_done_callback(lambda _: self._gatherer.close())
        try:
            await link.open()
        except MLXEngineError as error:
            return Ending(str(error))
        return None

    async def receive(self) -> bytes | Ending:
        """A batch of frames from the child, or its ``Ending``. One call at a time."""
        assert self._link is not None
        if not self._batches:
            self._batches.extend(batches(await self._gatherer.take()))
        return self._batches.popleft() if self._batches else await self._link.gone

    async def forward(self, number: int, batch: bytes) -> None:
        """Send the frames of a batch to the child, once those of all batches before are sent."""
        self._waiting[number] = batch
        while (due := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            for frame in self._splitter.feed(due):
                if self._link is not None:
                    self._link.send(frame)

    async def dump_stacks(self) -> None:
        """Have the child write its stacks."""
        if self._link is not None:
            await self._link.dump_stacks()

    async def terminate(self) -> None:
        """Ask the child to end."""
        if self._link is not None:
            self._link.terminate()

    async def kill(self) -> None:
        """End the child; ``receive`` tells how that went."""
        if self._link is not None:
            self._link.kill()
