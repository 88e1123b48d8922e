"""The connection of a host's client: what it may say, and how it is got rid of."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

from mlx_engine.errors import EngineBusy, EngineStopped
from mlx_engine.outputs import ShutdownReport
from mlx_engine.remote.serving.client_requests import ClientRequests
from mlx_engine.remote.serving.service import Service
from mlx_engine.remote.wire.frames import MAX_CLIENT_FRAME, FrameSplitter, WireError, framed
from mlx_engine.remote.wire.greeting import MAX_HELLO, check_hello
from mlx_engine.remote.wire.intake import messages_in
from mlx_engine.remote.wire.messages import (
    Ask,
    CacheFile,
    ErrorReply,
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


class ClientConnection(asyncio.Protocol):
    """A connection of a client. Whatever the client does, or does not do, is nobody else's trouble.

    Args:
        service: what it shares with the others.
        on_arrival: called when it is there; gives a reason to refuse it, if there is one.
        on_hello: called with its requests when it has said who it is; likewise.

    Attributes:
        requests: what the client has asked, once it has said who it is.
        over: whether the last word is said, or there is nobody to say it to.
        gone: done when it is closed, and its requests are out of MLX.
    """

    def __init__(
        self,
        service: Service,
        on_arrival: Callable[[ClientConnection], str | None],
        on_hello: Callable[[ClientConnection, ClientRequests], str | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = f"client {next(_numbers)}"
        self.requests: ClientRequests | None = None
        self.over = False
        self.gone: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._service = service
        self._on_arrival = on_arrival
        self._on_hello = on_hello
        self._frames = FrameSplitter(MAX_HELLO)
        self._steps: Iterator[None] | None = None  # of working off what it has said
        self._timers: list[asyncio.TimerHandle] = []
        self._deadline: float | None = None  # of its own shutdown, by the loop's clock
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none

    @property
    def served(self) -> bool:
        """True once the client has said who it is, while it may still ask."""
        return self.requests is not None and not self.over

    def put(self, message: object) -> None:
        """Tell it something, once it has said who it is; in the order of what it is told."""
        if self.requests is not None:
            self._outbox.put(message)

    def evict(self, reason: str) -> None:
        """Send it away, since it has not said who it is and others want in."""
        self._refuse(reason, "silent")

    def abort(self) -> None:
        """Close the connection without another word."""
        self.over = True
        self._transport.abort()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Give a sign of life, unless earlier ones wait to be read."""
        if self._transport.get_write_buffer_size() < _MAX_UNSENT_BEFORE_BEAT:
            self.put(heartbeat)

    def say_last(self, message: object) -> None:
        """Tell it one more thing, and close the connection when it has read that."""
        if self.over:
            return
        if self.requests is not None:
            self._outbox.flush()
        if self.over:  # by the flush: it does not read
            return
        self._transport.write(framed(encode([message])))
        self._close()

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._outbox = Outbox(self._write)
        self._timers = [self._loop.call_later(self._service.hello_timeout, self._no_hello)]
        reason = self._on_arrival(self)
        if reason is not None:
            self._refuse(reason, "leaving")

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if not self.over:
            self._frames.push(data)
            self._service.turns.add(self.work)

    def work(self, deadline: float) -> bool:
        """Take some of what it has said; while there is more, no more of it is read."""
        if self.over:
            return False
        if self._steps is None:
            self._steps = self._taking()
        try:
            for count, _ in enumerate(self._steps, 1):
                if self.over:
                    break
                if count == _MOST_STEPS or self._loop.time() >= deadline:
                    if not self._transport.is_closing():
                        self._transport.pause_reading()
                    return True
        except WireError as error:
            self._refuse(str(error), "nonsense")
        self._steps = None
        if self.over:
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
            if (requests := self.requests) is None:
                self._hello(frame)
                yield
                continue
            for step in messages_in(frame, self._service.engine.context_length):
                if isinstance(step.message, ErrorReply):
                    self._outbox.put(step.message)
                elif step.message is not None:
                    self._take(requests, step.message, step.size)
                yield

    def eof_received(self) -> None:
        """Close the connection: who will say nothing more is not there to be answered."""
        if not self.over:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self.over = True
        for timer in self._timers:
            timer.cancel()
        self._service.turns.discard(self.work)
        self._steps = None
        self._frames.clear()
        self._spawn(self._clean_up())

    def _write(self, payload: bytes) -> None:
        if self.over:
            return
        # What waits already, not this: a single answer may be longer.
        if self._transport.get_write_buffer_size() > MAX_UNSENT:
            self._complain("it does not read what it has asked for", "unread")
            self.abort()
        else:
            self._transport.write(framed(payload))

    def _refuse(self, reason: str, kind: str) -> None:
        if not self.over:
            self._complain(reason, kind)
            self.say_last(Refused(reason))

    def _complain(self, reason: str, kind: str) -> None:
        self._service.complaints.log(kind, f"{self.name}: {reason:.260}; its connection is closed")

    def _close(self) -> None:
        """Close once the other side has; a reset would cost it what it has not read yet."""
        self.over = True
        self._timers.append(self._loop.call_later(_LINGER, self._transport.abort))
        try:
            self._transport.write_eof()
        except OSError:  # macOS: the other side is gone already
            self._transport.abort()
        if self.requests is not None:
            self._spawn(self.requests.end())

    async def _clean_up(self) -> None:
        """See to it that nothing of a client that is gone is left in the engine."""
        try:
            if self.requests is not None:
                await self.requests.end()
        finally:
            if not self.gone.done():
                self.gone.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What it says

    def _no_hello(self) -> None:
        if self.requests is None and not self.over:
            self._refuse(f"nothing was said within {self._service.hello_timeout:g} s", "silent")

    def _hello(self, frame: bytes) -> None:
        check_hello(frame)
        requests = ClientRequests(
            self._service.engine,
            self._outbox,
            trusted=False,
            on_over=self._request_over,
            cache_folder=self._service.cache_folder,
            client=f"@{self.name.replace(' ', '-')}",
        )
        reason = self._on_hello(self, requests)
        if reason is not None:
            self._refuse(reason, "not wanted")
            return
        self.requests = requests
        self._frames.limit = MAX_CLIENT_FRAME
        self.put(requests.welcome())
        self.put(self._service.heartbeats.heartbeat())  # its watchdog counts from the first one on

    def _take(self, requests: ClientRequests, message: ToServer, size: int) -> None:
        match message:
            case Shutdown():
                self._drain(requests, message.remaining)
            case Generate() | Ask() | CacheFile() if self._draining:
                stopped = EngineStopped("the client is leaving: no new requests")
                self._outbox.put(error_to_wire(message.number, stopped))
            case Generate() | Ask() | CacheFile() if (most := _full(requests, size)) is not None:
                busy = EngineBusy(f"this client has {most} under way already", retry_after=1.0)
                self._outbox.put(error_to_wire(message.number, busy))
            case _:
                requests.take(message, size)

    def _drain(self, requests: ClientRequests, remaining: float | None) -> None:
        """Let its requests finish for so long, as it wants to go; the engine goes on."""
        if not self._draining:
            self._draining = True
            self._spawn(self._say_stopped(requests))
        if remaining is None:
            return
        deadline = self._loop.time() + max(0.0, remaining)  # which makes 0 of NaN, too
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
            end = self._loop.call_at(deadline, lambda: self._spawn(requests.end()))
            self._timers.append(end)

    def _request_over(self) -> None:
        """Send a heartbeat after the answer: whoever asks for statistics should have them."""
        self._service.heartbeats.step()
        self._outbox.put_last(self._service.heartbeats.heartbeat)

    async def _say_stopped(self, requests: ClientRequests) -> None:
        await requests.over()
        self.say_last(Stopped(ShutdownReport()))


def _full(requests: ClientRequests, size: int) -> str | None:
    """The most that a client may have under way, if it has that much already."""
    if requests.pending >= _MOST_REQUESTS:
        return f"{_MOST_REQUESTS} requests"
    if requests.held + size > _MOST_BYTES:
        return f"requests of {requests.held} bytes"
    return None
