"""The folder in which clients of a host may keep prompt caches, by plain names."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from mlx_engine.errors import InvalidRequest

_MOST_FILES = 100
_LONGEST = 200  # bytes of a name; that of the file while it is written has some more


class CacheFolder:
    """Turns the names that clients give into paths of this folder, and of no other.

    Args:
        folder: is there.

    Raises:
        InvalidRequest: it is not.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        text: Any = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
        if not isinstance(text, str) or not text or "\0" in text:
            raise InvalidRequest("cache_folder", f"must be the path of a folder, not {folder!r}")
        path = Path(os.path.realpath(os.path.expanduser(text)))
        if not path.is_dir():
            raise InvalidRequest("cache_folder", f"{text}: there is no such folder; make it first")
        self._folder = path

    def path(self, name: str, *, to_be_written: bool) -> Path:
        """The path of the file of that name.

        Raises:
            InvalidRequest: it is no plain name; something that is no regular file has it; or
                it is new, and the folder is full.
        """
        if (
            name != os.path.basename(name)
            or name.startswith(".")  # nothing, the folders, and what is being written too
            or not name.isprintable()
            or len(os.fsencode(name)) > _LONGEST
        ):
            raise InvalidRequest(
                "path",
                f"{name[:100]!r} is no plain name, such as 'chat.cache', which is all that a "
                "client gives: files are in the folder that its host has for them",
            )
        path = self._folder / name
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            if to_be_written:
                self._check_space()
            return path
        except OSError as error:
            raise InvalidRequest("path", f"{name}: {error.strerror}") from error
        if not stat.S_ISREG(mode):  # a link, by which files elsewhere could be meant
            raise InvalidRequest("path", f"{name} is no regular file; give another name")
        return path

    def _check_space(self) -> None:
        try:
            count = len(os.listdir(self._folder))
        except OSError as error:
            raise InvalidRequest("path", f"the host's folder: {error.strerror}") from error
        if count >= _MOST_FILES:
            raise InvalidRequest(
                "path",
                f"the host's folder has {_MOST_FILES} files already, which is its limit; give "
                "the name of one that may be replaced",
            )
