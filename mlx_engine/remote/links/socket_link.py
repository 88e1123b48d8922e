"""A link to an engine that another program hosts on a Unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
import sys

from mlx_engine.errors import EngineDead
from mlx_engine.remote.links.link import Ending, FrameProtocol, SocketEnd

_PATIENCE = 10.0  # seconds that the host may take to let us in
_AGAIN = 0.05


class SocketLink(SocketEnd):
    """A connection to a host. What is at the other end goes on when this ends.

    Args:
        path: of the socket.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._flaw: str | None = None
        self._closed = False  # by us

    async def open(self) -> None:
        """Connect.

        Raises:
            EngineDead: nobody serves there, or we may not connect; it says what to do.
        """
        sock: socket.socket | None = None
        try:
            sock = await self._connected()
            await self._loop.create_unix_connection(lambda: FrameProtocol(self), sock=sock)
        except BaseException as error:
            if sock is not None and self.transport is None:
                sock.close()
            self.kill()
            if isinstance(error, OSError):
                raise EngineDead(_why_not(self._path, error)) from error
            raise

    async def dump_stacks(self) -> None:
        """Do nothing: the host is another program, and serves others."""

    def terminate(self) -> None:
        """Close the connection, once what is to be sent has been; the host cancels our requests."""
        self._closed = True
        if self.transport is None:
            self._end()
        else:
            self.transport.close()

    def kill(self) -> None:
        """Close the connection at once; the host cancels our requests."""
        self._closed = True
        if self.transport is None:
            self._end()
        else:
            self.transport.abort()

    def _check_owner(self, sock: socket.socket) -> None:
        """Prompts go to a host of the same user, or of root, and to nobody else."""
        owner = _peer_uid(sock)
        if owner not in (None, 0, os.getuid()):
            raise EngineDead(
                f"the host at {self._path} is of another user (uid {owner}): choose a path in a "
                "folder where nobody else can write"
            )

    async def _connected(self) -> socket.socket:
        """Connect by hand: asyncio takes a host's "try again", of a full backlog, for success."""
        deadline = self._loop.time() + _PATIENCE
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.setblocking(False)
                sock.connect(self._path)
                self._check_owner(sock)
                return sock
            except BlockingIOError:
                sock.close()
                if self._loop.time() > deadline:
                    raise
                await asyncio.sleep(_AGAIN)
            except BaseException:
                sock.close()
                raise

    # What happens to the connection

    def connected(self, transport: asyncio.Transport) -> None:
        """Take the socket's transport."""
        super().connected(transport)
        if self._closed:  # while it was being opened
            transport.abort()

    def flawed(self, flaw: str) -> None:
        """Close the connection: what came over the socket makes no sense."""
        self._flaw = flaw
        self.kill()

    def disconnected(self, error: Exception | None) -> None:
        """Be gone: the connection is closed."""
        self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        if self.gone.done():
            return
        if self._flaw is not None:
            detail = f"{self._flaw}; the connection to its host was closed"
        elif self._closed:
            detail = "the connection to its host was closed"
        elif error is not None:
            detail = f"the connection to its host broke ({error})"
        else:
            detail = "its host closed the connection"
        self.gone.set_result(Ending(detail))


def _why_not(path: str, error: OSError) -> str:
    """The reason why nobody is reached, and what to do about it."""
    start = f"start one with: mlx-engine host MODEL --socket {path}"
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return f"no engine is hosted at {path}, there is no such socket: {start}"
        case PermissionError():
            return (
                f"the socket {path} is for another user: start this program as the user who "
                "started the host, or a host of your own"
            )
        case BlockingIOError():
            return (
                f"the host at {path} has let nobody in for {_PATIENCE:.0f} s: it is stuck or "
                "stopped; start it again"
            )
    if not _is_socket(path):
        return f"{path} is not a socket: choose another path"
    if isinstance(error, ConnectionRefusedError):
        return f"no engine is hosted at {path} any more, its host has ended: {start}"
    return f"cannot connect to {path}: {error.strerror or error}"


def _peer_uid(sock: socket.socket) -> int | None:
    """The user whose process is at the other end; ``None`` where the system does not tell."""
    if sys.platform == "darwin":  # LOCAL_PEERCRED gives a struct xucred: version, uid, groups
        _, uid = struct.unpack_from("II", sock.getsockopt(0, 1, 76))
        return int(uid)
    if sys.platform == "linux":
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(uid)
    return None


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # gone meanwhile, for one
