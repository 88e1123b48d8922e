"""The acceptor: lets the clients of a host in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from mlx_engine.remote.links.socket_file import SocketFile

_PAUSE = 1.0  # seconds until the next try, when there are no file descriptors left

_log = logging.getLogger("mlx_engine.host")


class Acceptor:
    """Accepts connections at a socket file, in the running event loop.

    By hand: a server of asyncio's that is closed while somebody comes in leaks the connection
    (CPython issue 109564).

    Args:
        file: where they come in.
        make_protocol: makes that of a connection.
    """

    def __init__(self, file: SocketFile, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._file = file
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._entering: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        file.socket.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Let nobody in any more, and remove the file. Any number of times."""
        if self._pause is not None:
            self._pause.cancel()
        if self._file.socket.fileno() >= 0:
            self._loop.remove_reader(self._file.socket)
            self._file.remove()
            self._file.socket.close()

    async def closed(self) -> None:
        """Wait, after ``close``, until those who were coming in are there."""
        if self._entering:
            await asyncio.wait(set(self._entering))

    def _listen(self) -> None:
        self._loop.add_reader(self._file.socket, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._file.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.warning("nobody can be let in for %g s: %s", _PAUSE, error)
            self._loop.remove_reader(self._file.socket)
            self._pause = self._loop.call_later(_PAUSE, self._listen)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._enter(connection))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def _enter(self, connection: socket.socket) -> None:
        entered = False
        try:
            with contextlib.suppress(OSError):  # gone already
                await self._loop.connect_accepted_socket(self._make_protocol, connection)
                entered = True
        finally:
            if not entered:
                connection.close()
