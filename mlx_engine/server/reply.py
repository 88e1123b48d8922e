"""The way back to a client: headers, a body, or events as they come and signs of life between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio

from mlx_engine.server.api import Events, encode
from mlx_engine.server.failures import Failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would gather events do not
]


class ClientGone(Exception):
    """The client has closed its connection, or does not read."""


class Reply:
    """A response on its way.

    Args:
        send: ASGI's.
        request_id: told to the client.

    Attributes:
        headers: sent with whatever is sent.
        status: of what was sent; 0 as long as nothing was.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        name = request_id.encode()
        self.headers: Headers = [(b"x-request-id", name), (b"request-id", name)]
        self.status = 0
        self._send = send

    async def whole(self, status: int, body: bytes, headers: Headers) -> None:
        """Send all of it."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [*headers, length])
        await self._body(body, more=False)

    async def json(self, status: int, value: object, headers: Headers | None = None) -> None:
        """Send a value as JSON."""
        await self.whole(status, encode(value), [*JSON, *(headers or ())])

    async def begin_events(self) -> None:
        """Send what comes before events."""
        await self._start(200, _EVENTS)

    async def events(self, data: bytes, *, more: bool = True) -> None:
        """Send some events."""
        await self._body(data, more=more)

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._out(
            {"type": "http.response.start", "status": status, "headers": headers + self.headers}
        )

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._out({"type": "http.response.body", "body": data, "more_body": more})

    async def _out(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:  # how servers tell of a client that is gone, if they do
            raise ClientGone from error


class EventStream:
    """A streamed answer on its way to a client.

    The response begins with the first chunk, so that whatever fails before has its own status; but
    after ``interval`` seconds at the latest, since clients give up on servers that say nothing.

    Args:
        reply: gets the events.
        events: makes them.
        counts: tells tokens of the prompt, and how many of them were cached.
        interval: seconds of silence after which a sign of life is sent.
        patience: seconds for which a client may read nothing.
    """

    def __init__(
        self,
        reply: Reply,
        events: Events,
        counts: Callable[[], tuple[int, int]],
        *,
        interval: float,
        patience: float,
    ) -> None:
        self._reply = reply
        self._events = events
        self._counts = counts
        self._interval = interval
        self._patience = patience
        self._over = False
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()  # when the client has last taken something

    async def write(self, make: Callable[[], bytes], *, more: bool = True) -> None:
        """Send some events, behind those that come first. Waits for a client that reads slowly.

        Args:
            make: makes them, once those before them are made.
        """
        async with self._lock:
            data = b""
            if not self._reply.status:
                await self._reply.begin_events()
                data = self._events.begin(*self._counts())
            data += make()
            if data or not more:
                await self._reply.events(data, more=more)
                self._over = not more  # not before it is taken: the last one may not be, either
                self._last = self._loop.time()
                if more:  # one that is gone is told of now, and not after a burst
                    await asyncio.sleep(0)

    async def fail(self, failure: Failure, body: object) -> None:
        """Tell of a failure: by its status and ``body``, or by an event if events have begun."""
        async with self._lock:
            if self._reply.status:
                await self._reply.events(self._events.fail(failure), more=False)
            else:
                await self._reply.json(failure.status, body, failure.headers)
            self._over = True

    async def keep_alive(self) -> None:
        """Send signs of life, as long as there is life.

        Raises:
            ClientGone: the client reads nothing.
        """
        while not self._over:
            silent = self._loop.time() - self._last
            if silent < self._interval:
                await asyncio.sleep(self._interval - silent)
            elif not self._lock.locked():
                with anyio.move_on_after(self._patience) as limit:
                    await self.write(self._events.pulse if self._reply.status else bytes)
                if limit.cancelled_caught:
                    raise ClientGone
            elif silent < self._patience:
                await asyncio.sleep(min(self._interval, self._patience - silent))
            else:
                raise ClientGone
