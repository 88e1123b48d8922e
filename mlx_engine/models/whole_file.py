"""Writing a file so that a crash at any moment leaves either the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx


def replace_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whatever its suffix, in place of the one that is there.

    Raises:
        OSError, RuntimeError: of the system or of MLX; the old file is as it was.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    _remove_left_over(path)
    # mlx appends .safetensors to any other name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(temporary), arrays, metadata)
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        _sync(path.parent, os.O_RDONLY)
    except OSError:
        pass  # not every system can; it is the new file's name that a power cut may undo


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
        pid = other.name.removeprefix(prefix).removesuffix(suffix)
        if other.name == f"{prefix}{pid}{suffix}" and pid.isdecimal() and not _is_alive(int(pid)):
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
