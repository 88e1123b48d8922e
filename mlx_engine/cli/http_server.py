"""uvicorn, as ``serve`` needs it: signals are the program's, and connections have limits."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_engine.checks import integer
from mlx_engine.errors import InvalidRequest

_HEAD_SECONDS = 15.0  # for the head of a request; a body has a limit of its own, the application's
_CONNECTIONS = 2_000  # at once; beyond that, those that wait for a request make room
_BURST = 2_000  # that may be there beside, as long as those that make room are being closed
_AHEAD = 65_536  # bytes of requests that come before the one in work is answered
_PATIENCE = 300.0  # seconds for which a client may read nothing of what it is sent
_BACKLOG = 1_000  # that come at a moment
_FILES = 4_096  # open ones that are enough for that; macOS begins with 256


class HttpServer(uvicorn.Server):
    """A server that leaves signals to the program."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(_Connection, OrderedDict()),  # type: ignore[arg-type]
                lifespan="off",
                ws="none",
                log_config=None,
                server_header=False,
                backlog=_BACKLOG,
                limit_concurrency=_CONNECTIONS + _BURST,
            )
        )
        _allow_files()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing of that."""
        yield

    async def listening(self, serving: asyncio.Task[None]) -> None:
        """Wait until clients can connect, or it has ended."""
        while not (self.started or serving.done()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)

    def cut(self) -> None:
        """Close all connections at once; what is in work for them ends as for clients that leave.

        To cancel that instead would have uvicorn say 500, and wait until that is read.
        """
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Connection(H11Protocol):
    """A connection that is closed when the head of a request does not come to its end, or when
    answers are not read; and that notices at any time that its client has closed it.

    Of h11, which has a limit for heads; httptools, which uvicorn would take where it finds it, has
    none.

    Args:
        others: the open connections of the server, as long ago as they came or had a request.
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, others: OrderedDict[_Connection, None], **options: Any) -> None:
        super().__init__(**options)
        self._others = others

    def connection_made(self, transport: Any) -> None:
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        if len(self._others) >= _CONNECTIONS:
            self._make_room()
        self._others[self] = None
        self._look(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        if self._timer is not None:
            self._timer.cancel()
        self._others.pop(self, None)
        super().connection_lost(exc)
        self._is_read()

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``. Who waits for it to go on waits for the client, in any room."""
        super().pause_writing()
        self._unread = self.loop.call_later(_PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        super().resume_writing()
        self._is_read()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def eof_received(self) -> None:
        """See ``asyncio.Protocol``. A request in work is cancelled, whatever is unread by then."""
        if not self._waits:
            self.transport.abort()  # closing waits for that to be read
        super().eof_received()

    def handle_events(self) -> None:
        """Read on, where uvicorn does not: behind a request that is there, while it is in work.

        Who does not read is not told that the client is gone: a line's end too many behind a
        request would have been enough for it to be worked at for nobody.
        """
        super().handle_events()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= _AHEAD:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Tell of what is no request, if nothing else is or was told in its place."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _should_upgrade(self) -> bool:
        """Never, and without a word: there are clients that ask for HTTP/2 each time."""
        return False

    @property
    def _waits(self) -> bool:
        """Whether no request is in work."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _look(self, before: object) -> None:
        """Close it, if it waits for the same request as it did ``before``."""
        if self._waits and before is self.cycle:
            self._end()
        else:
            mark = self.cycle if self._waits else self
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._look, mark)

    def _make_room(self) -> None:
        """Close the one that waits for the longest time: who holds many shuts nobody out."""
        for _ in range(len(self._others)):
            other, _ = self._others.popitem(last=False)
            if other._waits:
                other._end()
                return
            self._others[other] = None

    def _end(self) -> None:
        """Close it, once the client has read what is left; some never do."""
        self.transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_PATIENCE, self.transport.abort)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has its address, before a model is loaded in vain; nobody can connect yet.

    Raises:
        InvalidRequest: there is no such address, or it is taken.
    """
    integer("port", port, low=0, high=65_535)
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        door = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidRequest("host", f"{host}, port {port}: {error}") from error
    with door:
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
        except OSError as error:
            raise InvalidRequest(
                "port", f"cannot listen on {host}, port {port}: {error}"
            ) from error
        yield door


def _allow_files() -> None:
    """Let this process have as many files open as there may be connections, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
