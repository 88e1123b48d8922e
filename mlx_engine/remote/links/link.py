"""The way to whatever serves an engine elsewhere: frames to it and from it, and its end."""

from __future__ import annotations

import abc
import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass

from mlx_engine.errors import EngineDead
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.wire.frames import FrameSplitter, WireError, framed


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of what was at the other end of a link, as far as the link knows.

    Attributes:
        detail: in words, e.g. "its process was ended by SIGKILL".
        exit_code: of its process; negative is the number of the signal that ended it; ``None``
            if that is not known.
        stderr: the last lines that its process wrote to standard error, stacks included.
    """

    detail: str
    exit_code: int | None = None
    stderr: str = ""

    @property
    def signal_name(self) -> str | None:
        """``"SIGKILL"``, say, if a signal ended it."""
        if self.exit_code is None or self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"

    def error(self, reason: str) -> EngineDead:
        """The error of a start that this has met."""
        code, signal_name = self.exit_code, self.signal_name
        return Exit("crash", self.detail, code, signal_name, "start", self.stderr).error(reason)


class Link(abc.ABC):
    """A connection to what serves an engine: a child process, a socket, or an actor.

    Everything happens in the event loop of the I/O thread; nothing blocks. It is opened once
    and never again.

    Attributes:
        on_frame: called with each frame received: its payload, without the length.
        gone: done when the other end is gone for good: its process has ended, or the connection
            is closed. Never cancelled, never an exception.
    """

    def __init__(self) -> None:
        self.on_frame: Callable[[bytes], None] = _ignore
        self.gone: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    @abc.abstractmethod
    async def open(self) -> None:
        """Start the process, connect, or place the actor; frames may be sent from then on.

        Cancellation: nothing stays behind, and ``gone`` is done.

        Raises:
            MLXEngineError: it cannot be done.
        """

    @abc.abstractmethod
    def send(self, frame: bytes) -> None:
        """Send a frame, soon, in order. Nothing happens once the other end is gone."""

    @abc.abstractmethod
    async def dump_stacks(self) -> None:
        """Have the other end write the stacks of its threads to standard error, if it can.

        Returns when they are there, or after 0.2 s.
        """

    @abc.abstractmethod
    def terminate(self) -> None:
        """Ask the other end to end (SIGTERM)."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End the other end (SIGKILL); ``gone`` is done soon, whatever it was doing."""


class SocketEnd(Link):
    """A link over a socket of this machine; ``FrameProtocol`` tells it what happens there.

    Attributes:
        transport: of the socket, once that can be written to.
    """

    transport: asyncio.Transport | None = None

    def send(self, frame: bytes) -> None:
        """Send a frame, soon, in order."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(framed(frame))

    def connected(self, transport: asyncio.Transport) -> None:
        """Take the socket's transport: it can be written to."""
        self.transport = transport

    @abc.abstractmethod
    def flawed(self, flaw: str) -> None:
        """Be told that what came over the socket makes no sense."""

    @abc.abstractmethod
    def disconnected(self, error: Exception | None) -> None:
        """Be told that the socket has ended."""


class FrameProtocol(asyncio.Protocol):
    """Cuts what comes over a socket into frames, for its link."""

    def __init__(self, link: SocketEnd) -> None:
        self._link = link
        self._frames = FrameSplitter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._link.connected(transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        try:
            for frame in self._frames.feed(data):
                self._link.on_frame(frame)
        except WireError as error:
            self._link.flawed(f"it said something that makes no sense ({error})")

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._link.disconnected(exc)


def _ignore(frame: bytes) -> None:
    """Drop a frame: nobody listens yet."""
