"""Bodies of requests, on their way and as they are there."""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio

from mlx_engine.server.failures import Failure
from mlx_engine.server.json_body import decoded
from mlx_engine.server.reply import ClientGone, Receive

_TOGETHER = 4  # bodies of the largest size, in bytes, that may be on their way


@dataclass(eq=False, slots=True)
class _Coming:
    """A body on its way."""

    client: bytes
    scope: anyio.CancelScope
    data: bytearray = field(default_factory=bytearray)
    gives_way: bool = False


class Bodies:
    """The bodies that are on their way to a server, of all clients.

    A body is in nobody's way as long as it is coming: when there are too many of a client's, or
    too many bytes of all, that which began first gives way. So those that trickle hold up no
    other, not even of the same client, and what is there of all of them has a bound.

    Args:
        most_bytes: of a body; of all together, four times as many.
        most: bodies of a client.
        seconds: that a body may take to come.
    """

    def __init__(self, most_bytes: int, most: int, seconds: float) -> None:
        self._most_bytes = most_bytes
        self._most = most
        self._seconds = seconds
        self._coming: dict[_Coming, None] = {}  # the first of them began first
        self._bytes = 0

    async def read_json(self, receive: Receive, client: bytes, declared: bytes = b"") -> object:
        """The JSON value that a body is.

        Args:
            client: whose it is.
            declared: how long it is to be, if its head tells: a body that is too large is refused
                before any of it is read.

        Raises:
            ClientGone: it has not come to its end.
            Failure: it is too large or too slow, or others needed its place.
            InvalidRequest: it is no JSON, or has too many values.
        """
        if declared.isdigit() and int(declared[:20]) > self._most_bytes:
            raise self._too_large()
        with anyio.move_on_after(self._seconds) as scope:
            coming = _Coming(client, scope)
            self._make_place(client)
            self._coming[coming] = None
            try:
                await self._read(receive, coming)
            finally:
                self._leave(coming)
        if coming.gives_way:
            said = "the body was on its way for longest, and others needed its place; send it again"
            raise Failure("busy", said, retry_after=1)
        if scope.cancelled_caught:
            raise Failure("slow", f"the body has not come within {self._seconds:g} s")
        return decoded(coming.data)

    async def _read(self, receive: Receive, coming: _Coming) -> None:
        more = True
        while more and not coming.gives_way:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            if coming.gives_way:
                return
            piece = message.get("body", b"")
            coming.data += piece
            self._bytes += len(piece)
            if len(coming.data) > self._most_bytes:
                raise self._too_large()
            while self._bytes > _TOGETHER * self._most_bytes:
                self._push_out(next(iter(self._coming)))
            more = message.get("more_body", False)

    def _make_place(self, client: bytes) -> None:
        own = [each for each in self._coming if each.client == client]
        if len(own) >= self._most:
            self._push_out(own[0])

    def _push_out(self, coming: _Coming) -> None:
        coming.gives_way = True
        self._leave(coming)
        coming.data = bytearray()
        coming.scope.cancel()

    def _leave(self, coming: _Coming) -> None:
        if coming in self._coming:
            del self._coming[coming]
            self._bytes -= len(coming.data)

    def _too_large(self) -> Failure:
        return Failure("too_large", f"the body is larger than {self._most_bytes} bytes")
