"""Writing a file so that a crash at any moment leaves either the old one or the new one."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

_OWNERS = 0o600  # what has prompts in it is for nobody else
_numbers = itertools.count(1)  # of temporary files of this process: two may be of one path


def replace_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whatever its suffix, in place of the one that is there.

    A symbolic link stays one.

    Raises:
        OSError, RuntimeError: of the system or of MLX, or what is there is no regular file; it
            is as it was.
    """
    with replacing(path) as temporary:
        mx.save_safetensors(str(temporary), arrays, metadata)


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A new file to be written, which takes the place of the one at ``path`` at the end.

    If the block raises, or the end does, what was there is as it was, and the new file is gone.
    A symbolic link stays one.

    Args:
        private: nobody else may read it, whatever the umask says, nor may they while it is
            written; what the old file's permissions forbid stays forbidden.

    Yields:
        where it is to be written; the file is there already, and empty, if it is private.

    Raises:
        OSError: of the system, or what is there is no regular file.
    """
    path = path.resolve()
    mode = _mode_of(path)
    _remove_left_over(path)
    # mlx appends .safetensors to any other name.
    name = f".{path.name}.{os.getpid()}-{next(_numbers)}.safetensors"
    temporary = path.with_name(name)
    try:
        if private:
            _create(temporary)
        yield temporary
        _sync(temporary, os.O_RDWR)
        if private and mode is not None:
            os.chmod(temporary, _OWNERS & mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        _sync(path.parent, os.O_RDONLY)
    except OSError:
        pass  # not every system can; it is the new file's name that a power cut may undo


def _mode_of(path: Path) -> int | None:
    """The permissions of what is there, if anything is.

    Raises:
        OSError: it is a folder, a device or a pipe, which no file takes the place of.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError("it is no regular file")
    return stat.S_IMODE(mode)


def _create(temporary: Path) -> None:
    """Make an empty file, which whoever writes into it finds with its permissions."""
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _OWNERS)
    try:
        os.fchmod(handle, _OWNERS)  # the umask may have taken some of it
    finally:
        os.close(handle)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_left_over(path: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote one."""
    prefix, suffix = f".{path.name}.", ".safetensors"
    for other in path.parent.iterdir():
        name = other.name.removeprefix(prefix).removesuffix(suffix)
        pid, _, number = name.partition("-")
        ours = other.name == f"{prefix}{name}{suffix}" and pid.isdecimal()
        if ours and (number.isdecimal() or name == pid) and not _is_alive(int(pid)):
            try:
                other.unlink()
            except OSError:
                pass  # it takes space, and does no other harm


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it is, or nobody can tell
    return True
