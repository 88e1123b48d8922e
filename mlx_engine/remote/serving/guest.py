"""One client of a host: its connection, what it may say, and how it is got rid of."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

import msgspec

from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineBusy, EngineStopped
from mlx_engine.outputs import ShutdownReport
from mlx_engine.remote.serving.session import Session
from mlx_engine.remote.wire.frames import MAX_GUEST_FRAME, FrameSplitter, WireError, framed
from mlx_engine.remote.wire.messages import (
    MAGIC,
    VERSION,
    CacheFile,
    Generate,
    Heartbeat,
    Hello,
    Refused,
    Shutdown,
    Stopped,
    ToServer,
    decode_from_client,
    encode,
)
from mlx_engine.remote.wire.outbox import Outbox
from mlx_engine.remote.wire.values import error_to_wire

MAX_UNSENT = 64 * 2**20  # bytes that may wait for a client to read them
_MAX_UNSENT_BEFORE_BEAT = 2**20  # bytes; a client that is stopped need not hear more beats
_MAX_HELLO = 4096  # bytes
_MANY = 0xDD  # the first byte of a list of more than 65,535 messages in msgpack
_MOST_REQUESTS = 1024  # of one client at a time
_LINGER = 1.0  # seconds for a client to read the last word

_log = logging.getLogger("mlx_engine.host")
_numbers = itertools.count(1)


class Reception(Protocol):
    """What a guest needs of its host."""

    @property
    def engine(self) -> BaseEngine:
        """What is served."""

    @property
    def hello_timeout(self) -> float:
        """Seconds in which a guest must have said who it is."""

    def arrived(self, guest: Guest) -> str | None:
        """Somebody has connected; a reason to close the connection without a word."""

    def greeted(self, guest: Guest, session: Session) -> str | None:
        """It has said who it is; a reason to refuse it."""

    def heartbeat(self) -> Heartbeat:
        """A sign of life."""

    def request_over(self, guest: Guest) -> None:
        """A request of its is over."""

    def left(self, guest: Guest) -> None:
        """Its connection is closed, and its requests are over."""


class Guest(asyncio.Protocol):
    """A client. Whatever it does, or does not do, is the trouble of nobody else.

    Attributes:
        session: what it has asked, once it has said who it is.
        gone: done when its connection is closed, and its requests are out of MLX.
    """

    def __init__(self, host: Reception) -> None:
        loop = asyncio.get_running_loop()
        self.name = f"client {next(_numbers)}"
        self.session: Session | None = None
        self.gone: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._host = host
        self._frames = FrameSplitter(MAX_GUEST_FRAME)
        self._over = False  # the last word is said, or there is nobody to say it to
        self._timers: list[asyncio.TimerHandle] = []
        self._deadline: float | None = None  # of its own shutdown, by the loop's clock
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none

    @property
    def served(self) -> bool:
        """Whether it has said who it is, and may still ask."""
        return self.session is not None and not self._over

    def put_last(self, make: Callable[[], object]) -> None:
        """Tell it what ``make`` makes, after what there is to tell now; once for many calls."""
        if self.session is not None:
            self._outbox.put_last(make)

    def put(self, message: object) -> None:
        """Tell it something, once it has said who it is; in the order of what it is told."""
        if self.session is not None:
            self._outbox.put(message)

    def beat(self, heartbeat: Heartbeat) -> None:
        """Give a sign of life, unless earlier ones wait to be read."""
        if self._transport.get_write_buffer_size() < _MAX_UNSENT_BEFORE_BEAT:
            self.put(heartbeat)

    def say_last(self, message: object) -> None:
        """Tell it one more thing, and close the connection when it has read that."""
        if self._over:
            return
        if self.session is not None:
            self._outbox.flush()
        if self._over:  # by the flush: it does not read
            return
        self._transport.write(framed(encode([message])))
        self._close()

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """By asyncio: it is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._outbox = Outbox(self._write)
        self._timers = [self._loop.call_later(self._host.hello_timeout, self._no_hello)]
        reason = self._host.arrived(self)
        if reason is not None:
            self._drop(reason)

    def data_received(self, data: bytes) -> None:
        """By asyncio: it says something."""
        if self._over:
            return
        try:
            for frame in self._frames.feed(data):
                if self._over:
                    return
                if self.session is None:
                    self._hello(frame)
                    continue
                if frame[:1] and frame[0] == _MANY:
                    raise WireError("there are too many messages in a frame")
                for message in decode_from_client(frame):
                    self._take(self.session, message)
        except WireError as error:
            self._refuse(str(error))

    def eof_received(self) -> None:
        """By asyncio: it will say nothing more, and so nobody is there to be answered."""
        if not self._over:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """By asyncio: it is gone."""
        self._over = True
        for timer in self._timers:
            timer.cancel()
        self._spawn(self._clean_up())

    def _write(self, payload: bytes) -> None:
        if self._over:
            return
        # What waits already, not this: a single answer may be longer.
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            self._drop("it does not read what it has asked for")
        else:
            self._transport.write(framed(payload))

    def _drop(self, reason: str) -> None:
        self._log(reason)
        self._over = True
        self._transport.abort()

    def _refuse(self, reason: str) -> None:
        if not self._over:
            self._log(reason)
            self.say_last(Refused(reason))

    def _log(self, reason: str) -> None:
        """One line, whatever bytes of a stranger are in the reason."""
        _log.warning("%s: %.300s; its connection is closed", self.name, " ".join(reason.split()))

    def _close(self) -> None:
        """Close once the other side has; a reset would cost it what it has not read yet."""
        self._over = True
        self._timers.append(self._loop.call_later(_LINGER, self._transport.abort))
        try:
            self._transport.write_eof()
        except OSError:  # macOS: the other side is gone already
            self._transport.abort()
        if self.session is not None:
            self._spawn(self.session.end())

    async def _clean_up(self) -> None:
        """After the connection: see to it that nothing of its is left in the engine."""
        try:
            if self.session is not None:
                await self.session.end()
        finally:
            self._host.left(self)
            if not self.gone.done():
                self.gone.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What it says

    def _no_hello(self) -> None:
        if self.session is None and not self._over:
            self._refuse(f"nothing was said within {self._host.hello_timeout:g} s")

    def _hello(self, frame: bytes) -> None:
        _check_hello(frame)
        session = Session(
            self._host.engine,
            self._outbox,
            trusted=False,
            on_over=lambda: self._host.request_over(self),
            client=f"@{self.name.replace(' ', '-')}",
        )
        reason = self._host.greeted(self, session)
        if reason is not None:
            self._refuse(reason)
            return
        self.session = session
        self.put(session.welcome())
        self.put(self._host.heartbeat())  # its watchdog counts from the first one on

    def _take(self, session: Session, message: ToServer) -> None:
        match message:
            case Shutdown():
                self._leave(session, message.remaining)
            case Generate() | CacheFile() if self._leaving:
                stopped = EngineStopped("the client is leaving: no new requests")
                self._outbox.put(error_to_wire(message.number, stopped))
            case Generate() | CacheFile() if session.pending >= _MOST_REQUESTS:
                busy = EngineBusy(
                    f"this client has {_MOST_REQUESTS} requests under way already", retry_after=1.0
                )
                self._outbox.put(error_to_wire(message.number, busy))
            case _:
                session.take(message)

    def _leave(self, session: Session, remaining: float | None) -> None:
        """It wants to go: its requests may finish for so long, the engine goes on."""
        if not self._leaving:
            self._leaving = True
            self._spawn(self._say_stopped(session))
        if remaining is None:
            return
        deadline = self._loop.time() + max(0.0, remaining)  # which makes 0 of NaN, too
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
            end = self._loop.call_at(deadline, lambda: self._spawn(session.end()))
            self._timers.append(end)

    async def _say_stopped(self, session: Session) -> None:
        await session.over()
        self.say_last(Stopped(ShutdownReport()))


def _check_hello(frame: bytes) -> None:
    """See that a client says hello, in whatever version; nothing else of it is looked at.

    Raises:
        WireError: it does not, or in another version.
    """
    said: Any = None
    if len(frame) <= _MAX_HELLO:
        try:
            said = msgspec.msgpack.decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            pass
    hello = said[0] if isinstance(said, list) and said else None
    if not (
        isinstance(hello, list)
        and len(hello) >= 3
        and hello[:2] == [Hello.__name__.lower(), MAGIC]
        and type(version := hello[2]) is int
    ):
        raise WireError("that is no greeting of mlx_engine")
    if version != VERSION:
        older = "host" if version > VERSION else "client"
        raise WireError(
            f"this host speaks version {VERSION}, the client speaks {version}: upgrade the {older}"
        )
    if len(said) > 1:
        raise WireError("a client waits for an answer to its greeting")
