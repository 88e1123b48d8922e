"""Unix sockets as files: whether a path can be one, and the one that a host listens at."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import stat
import sys
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest

_LONGEST = 107 if sys.platform == "linux" else 103  # bytes in sockaddr_un.sun_path, less a NUL
_LOCK_TRIES = 40
_LOCK_WAIT = 0.05  # seconds


def checked_socket_path(path: str | os.PathLike[str]) -> str:
    """``path``, if a socket can be there.

    Raises:
        InvalidRequest: it is of another type, empty, or longer than the system allows.
    """
    text: Any = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidRequest("path", f"must be the path of a Unix socket, not {shown(path)}")
    expanded = os.path.expanduser(text)
    _check_length(expanded, expanded)
    return expanded


def check_free(path: str) -> None:
    """See that a host may listen at ``path``: nobody does, and nothing would be lost.

    Raises:
        InvalidRequest: there is no such folder, something serves there, or it is a file of
            another kind.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InvalidRequest("path", f"{path}: there is no folder {folder}")
    _check_length(_nested(path, "0000"), path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidRequest("path", f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise InvalidRequest("path", f"{path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # what is left of a host that is dead
        except BlockingIOError:
            pass  # many wait to be let in: it lives
        except OSError as error:
            raise InvalidRequest("path", f"{path}: {error.strerror}") from error
    raise InvalidRequest(
        "path", f"another host serves on {path}: stop it first, or choose another path"
    )


class SocketFile:
    """A socket that listens at a path, which only its owner can connect to.

    Attributes:
        path: where it is.
        socket: what listens.
    """

    def __init__(self, path: str) -> None:
        """See ``open``.

        Raises:
            InvalidRequest: see ``check_free``.
            OSError: the socket cannot be made.
        """
        check_free(path)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            # Made where nobody else can get at it, and moved once it has its permissions. A
            # umask would do as well, but is the whole process's: files that other threads make
            # at that moment would have it too.
            nested = _nested(path, _private_folder(path))
            try:
                self.socket.bind(nested)
                os.chmod(nested, 0o600)
                self.socket.listen(128)
                os.rename(nested, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(nested)
                raise
            finally:
                os.rmdir(os.path.dirname(nested))
            self._identity = _identity(path)
        except BaseException:
            self.socket.close()
            raise

    @classmethod
    async def open(cls, path: str) -> SocketFile:
        """Listen at ``path``; the socket of a host that is dead is replaced.

        Raises:
            InvalidRequest: it cannot be done, or should not; see ``check_free``.
        """
        lock = await _lock(os.path.dirname(path) or ".")
        try:
            return cls(path)
        except OSError as error:
            raise InvalidRequest("path", f"{path}: {error.strerror or error}") from error
        finally:
            if lock is not None:
                os.close(lock)

    def remove(self) -> None:
        """Delete the file, unless another host has replaced it. While the socket is open: until
        then no other file can have its identity.
        """
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


async def _lock(folder: str) -> int | None:
    """Have a folder to oneself, as far as hosts go; closing the descriptor ends that.

    Of two hosts that start at once, both could find a dead one's socket, and the second would
    replace that of the first. Where locks do not work, that is left to luck.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_LOCK_WAIT)
            else:
                break
    except OSError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _private_folder(path: str) -> str:
    """Make a folder beside ``path`` that is its owner's alone; the random part of its name."""
    while True:
        name = secrets.token_hex(2)
        try:
            os.mkdir(os.path.dirname(_nested(path, name)), 0o700)
        except FileExistsError:
            continue
        return name


def _nested(path: str, name: str) -> str:
    """Short, since the length of the path of a socket is limited."""
    return os.path.join(os.path.dirname(path), f".{name}", "s")


def _check_length(path: str, wanted: str) -> None:
    size = len(os.fsencode(path))
    if size > _LONGEST:
        raise InvalidRequest(
            "path",
            f"{wanted} is too long for a Unix socket by {size - _LONGEST} bytes: choose a shorter "
            "path, or a relative one",
        )


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
