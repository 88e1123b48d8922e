"""One client of a host: its connection, what it may say, and how it is got rid of."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol, cast

from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import EngineBusy, EngineStopped
from mlx_engine.outputs import ShutdownReport
from mlx_engine.remote.serving.cache_folder import CacheFolder
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.complaints import Complaints
from mlx_engine.remote.serving.round_robin import RoundRobin
from mlx_engine.remote.wire.frames import MAX_GUEST_FRAME, FrameSplitter, WireError, framed
from mlx_engine.remote.wire.greeting import MAX_HELLO, check_hello
from mlx_engine.remote.wire.intake import Refusal, messages_in
from mlx_engine.remote.wire.messages import (
    CacheFile,
    Generate,
    Heartbeat,
    Refused,
    Shutdown,
    Stopped,
    ToServer,
    encode,
)
from mlx_engine.remote.wire.outbox import Outbox
from mlx_engine.remote.wire.values import error_to_wire

MAX_UNSENT = 64 * 2**20  # bytes that may wait for a client to read them
_MAX_UNSENT_BEFORE_BEAT = 2**20  # bytes; a client that is stopped need not hear more beats
_MOST_REQUESTS = 1024  # of one client at a time
_MOST_BYTES = 64 * 2**20  # of its large requests at a time
_MOST_STEPS = 16  # in a slice: what a request starts, or a cancel ends, comes on top
_LINGER = 1.0  # seconds for a client to read the last word

_numbers = itertools.count(1)


class Reception(Protocol):
    """What a guest needs of its host."""

    @property
    def engine(self) -> BaseEngine:
        """What is served."""

    @property
    def hello_timeout(self) -> float:
        """Seconds in which a guest must have said who it is."""

    @property
    def cache_folder(self) -> CacheFolder | None:
        """Where guests may keep prompt caches."""

    @property
    def turns(self) -> RoundRobin:
        """Gives guests slices of the event loop."""

    @property
    def complaints(self) -> Complaints:
        """Of guests that do not behave."""

    def arrived(self, guest: ClientConnection) -> str | None:
        """Somebody has connected; a reason to refuse it."""

    def greeted(self, guest: ClientConnection, session: ClientRequests) -> str | None:
        """It has said who it is; a reason to refuse it."""

    def heartbeat(self) -> Heartbeat:
        """A sign of life."""

    def request_over(self, guest: ClientConnection) -> None:
        """A request of its is over."""

    def left(self, guest: ClientConnection) -> None:
        """Its connection is closed, and its requests are over."""


class ClientConnection(asyncio.Protocol):
    """A client. Whatever it does, or does not do, is the trouble of nobody else.

    Attributes:
        session: what it has asked, once it has said who it is.
        gone: done when its connection is closed, and its requests are out of MLX.
    """

    def __init__(self, host: Reception) -> None:
        loop = asyncio.get_running_loop()
        self.name = f"client {next(_numbers)}"
        self.session: ClientRequests | None = None
        self.gone: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._host = host
        self._frames = FrameSplitter(MAX_HELLO)
        self._steps: Iterator[None] | None = None  # of working off what it has said
        self._over = False  # the last word is said, or there is nobody to say it to
        self._timers: list[asyncio.TimerHandle] = []
        self._deadline: float | None = None  # of its own shutdown, by the loop's clock
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none

    @property
    def served(self) -> bool:
        """Whether it has said who it is, and may still ask."""
        return self.session is not None and not self._over

    @property
    def over(self) -> bool:
        """Whether the last word is said, or there is nobody to say it to."""
        return self._over

    def put_last(self, make: Callable[[], object]) -> None:
        """Tell it what ``make`` makes, after what there is to tell now; once for many calls."""
        if self.session is not None:
            self._outbox.put_last(make)

    def put(self, message: object) -> None:
        """Tell it something, once it has said who it is; in the order of what it is told."""
        if self.session is not None:
            self._outbox.put(message)

    def evict(self, reason: str) -> None:
        """Send it away, since it has not said who it is and others want in."""
        self._refuse(reason, "silent")

    def abort(self) -> None:
        """Close the connection without another word."""
        self._over = True
        self._transport.abort()

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
            self._refuse(reason, "leaving")

    def data_received(self, data: bytes) -> None:
        """By asyncio: it says something."""
        if not self._over:
            self._frames.push(data)
            self._host.turns.add(self)

    def work(self, deadline: float) -> bool:
        """Take some of what it has said; while there is more, no more of it is read."""
        if self._over:
            return False
        if self._steps is None:
            self._steps = self._taking()
        try:
            for count, _ in enumerate(self._steps, 1):
                if self._over:
                    break
                if count == _MOST_STEPS or self._loop.time() >= deadline:
                    if not self._transport.is_closing():
                        self._transport.pause_reading()
                    return True
        except WireError as error:
            self._refuse(str(error), "nonsense")
        self._steps = None
        if self._over:
            self._frames.clear()
        if not self._transport.is_closing():
            self._transport.resume_reading()  # if it is over, to see when the other side closes
        return False

    def _taking(self) -> Iterator[None]:
        """Take what it has said, in short steps.

        Raises:
            WireError: it makes no sense.
        """
        while (frame := self._frames.pop()) is not None:
            if (session := self.session) is None:
                self._hello(frame)
                yield
                continue
            for step in messages_in(frame, self._host.engine.context_length):
                if isinstance(step.message, Refusal):
                    self._outbox.put(error_to_wire(step.message.number, step.message.error))
                elif step.message is not None:
                    self._take(session, step.message, step.size)
                yield

    def eof_received(self) -> None:
        """By asyncio: it will say nothing more, and so nobody is there to be answered."""
        if not self._over:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """By asyncio: it is gone."""
        self._over = True
        for timer in self._timers:
            timer.cancel()
        self._host.turns.discard(self)
        self._steps = None
        self._frames.clear()
        self._spawn(self._clean_up())

    def _write(self, payload: bytes) -> None:
        if self._over:
            return
        # What waits already, not this: a single answer may be longer.
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            self._drop("it does not read what it has asked for", "unread")
        else:
            self._transport.write(framed(payload))

    def _drop(self, reason: str, kind: str) -> None:
        self._complain(reason, kind)
        self.abort()

    def _refuse(self, reason: str, kind: str) -> None:
        if not self._over:
            self._complain(reason, kind)
            self.say_last(Refused(reason))

    def _complain(self, reason: str, kind: str) -> None:
        self._host.complaints.log(kind, f"{self.name}: {reason:.260}; its connection is closed")

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
            self._refuse(f"nothing was said within {self._host.hello_timeout:g} s", "silent")

    def _hello(self, frame: bytes) -> None:
        check_hello(frame)
        session = ClientRequests(
            self._host.engine,
            self._outbox,
            trusted=False,
            on_over=lambda: self._host.request_over(self),
            cache_folder=self._host.cache_folder,
            client=f"@{self.name.replace(' ', '-')}",
        )
        reason = self._host.greeted(self, session)
        if reason is not None:
            self._refuse(reason, "not wanted")
            return
        self.session = session
        self._frames.limit = MAX_GUEST_FRAME
        self.put(session.welcome())
        self.put(self._host.heartbeat())  # its watchdog counts from the first one on

    def _take(self, session: ClientRequests, message: ToServer, size: int) -> None:
        match message:
            case Shutdown():
                self._leave(session, message.remaining)
            case Generate() | CacheFile() if self._leaving:
                stopped = EngineStopped("the client is leaving: no new requests")
                self._outbox.put(error_to_wire(message.number, stopped))
            case Generate() | CacheFile() if (most := _full(session, size)) is not None:
                busy = EngineBusy(f"this client has {most} under way already", retry_after=1.0)
                self._outbox.put(error_to_wire(message.number, busy))
            case _:
                session.take(message, size)

    def _leave(self, session: ClientRequests, remaining: float | None) -> None:
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

    async def _say_stopped(self, session: ClientRequests) -> None:
        await session.over()
        self.say_last(Stopped(ShutdownReport()))


def _full(session: ClientRequests, size: int) -> str | None:
    """How much a client has under way, if one more request of that size would be too much."""
    if session.pending >= _MOST_REQUESTS:
        return f"{_MOST_REQUESTS} requests"
    if session.held + size > _MOST_BYTES:
        return f"requests of {session.held} bytes"
    return None
