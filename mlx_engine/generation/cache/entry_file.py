"""A file of entries: their bytes one after another, then an index, and checksums of all of it.

    mlx-engine prompt cache 2\\n    its format
    entry, entry, ...               the bytes of each; there may be others between them
    index                           JSON: of each entry where it is, its checksum and what it is
    trailer                         where the index is, and its checksum

No MLX here: a file is written and read piece by piece, on a thread that need not be MLX's.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader, BufferedWriter
from typing import Any

from mlx_engine.core.stop import checkpoint

FORMAT = 2
PIECE = 2**24  # bytes between two looks at whether to stop

_BEGINNING = b"mlx-engine prompt cache "
_TRAILER = struct.Struct("<QQ16s")  # where the index is, its bytes, and its checksum
_SYNC = 2**28  # bytes after which the disk has to have them: none has to take all at the end
_OLDEST_KEY = "mlx_engine.prompt_cache"  # in the metadata of a safetensors file: format 1
_MOST_OLD = 2**27  # bytes of that file's header

Described = dict[str, Any]


class WrongFormat(Exception):
    """Written in another format, by another version; ``args`` has which."""


def digest_of(*parts: bytes) -> bytes:
    """The checksum of bytes."""
    digest: bytes = _digest(*parts).digest()
    return digest


def _digest(*parts: bytes) -> Any:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest


class EntryWriter:
    """Writes entries into a new file.

    Args:
        file: opened for writing, empty.
        beat: called after each piece.

    Attributes:
        entries: what the index will have of those that are whole.
    """

    def __init__(self, file: BufferedWriter, beat: Callable[[], None]) -> None:
        self.entries: list[Described] = []
        self._file = file
        self._beat = beat
        self._unsynced = 0
        self._first_line = _BEGINNING + f"{FORMAT}\n".encode()
        file.write(self._first_line)
        self._begin_entry()

    def write(self, data: memoryview) -> None:
        """More bytes of the entry that is under way.

        Raises:
            OSError: of the system.
            Interrupted: the work should end.
        """
        for start in range(0, len(data), PIECE):
            checkpoint()
            piece = data[start : start + PIECE]
            self._file.write(piece)
            self._digest.update(piece)
            self._unsynced += len(piece)
            if self._unsynced >= _SYNC:
                self._unsynced = 0
                self._file.flush()
                os.fsync(self._file.fileno())
            self._beat()

    def end_entry(self, described: Described) -> None:
        """All of its bytes are written; the index says of it what ``described`` has."""
        size = self._file.tell() - self._start
        self.entries.append(
            {**described, "at": self._start, "nbytes": size, "digest": self._digest.hexdigest()}
        )
        self._begin_entry()

    def finish(self, about: Described) -> None:
        """Write the index, which has what ``about`` has."""
        start = self._file.tell()
        index = json.dumps({**about, "entries": self.entries}).encode()
        self._file.write(index)
        checksum = digest_of(self._first_line, index)
        self._file.write(_TRAILER.pack(start, len(index), checksum))
        self._file.flush()

    def _begin_entry(self) -> None:
        self._start, self._digest = self._file.tell(), _digest()


class EntryReader:
    """Reads a file that an ``EntryWriter`` has written.

    Args:
        file: opened for reading, at its beginning.
        beat: called after each piece.

    Raises:
        WrongFormat: it was written by another version.
        ValueError, LookupError, TypeError: it is broken, or something else.

    Attributes:
        about: what the index has.
        entries: of each entry.
    """

    def __init__(self, file: BufferedReader, beat: Callable[[], None]) -> None:
        self._file = file
        self._beat = beat
        self._size = os.fstat(file.fileno()).st_size
        first_line = file.read(len(_BEGINNING) + 20)
        if not first_line.startswith(_BEGINNING):
            self._check_oldest(first_line)
            raise ValueError("it is something else")
        number, newline, _ = first_line.removeprefix(_BEGINNING).partition(b"\n")
        if not (newline and number.isdigit()):
            raise ValueError("its beginning is damaged")
        if int(number) != FORMAT:
            raise WrongFormat(int(number))
        first_line = first_line[: len(_BEGINNING) + len(number) + 1]
        self._start = len(first_line)
        start, size, checksum = _TRAILER.unpack(self._read(self._size - _TRAILER.size, self._size))
        self._end = self._size - _TRAILER.size - size
        if start != self._end or start < self._start:
            raise ValueError("its end is missing")
        index = bytes(self._read(start, start + size))
        if digest_of(first_line, index) != checksum:
            raise ValueError("its index is damaged: the checksum is wrong")
        self.about: Described = json.loads(index)
        self.entries: list[Described] = list(self.about["entries"])
        for entry in self.entries:
            self._check_place(entry)

    def read(self, entry: Described, sizes: Iterable[int]) -> Iterator[memoryview]:
        """The bytes of an entry, in parts of these sizes, which are all of it.

        Raises:
            ValueError: at the end, if the checksum is wrong; or the file has become shorter.
            OSError: of the system.
            Interrupted: the work should end.
        """
        digest, at = _digest(), entry["at"]
        for size in sizes:
            part = memoryview(bytearray(size))
            for start in range(0, size, PIECE):
                checkpoint()
                piece = part[start : start + PIECE]
                self._fill(at + start, piece)
                digest.update(piece)
                self._beat()
            at += size
            yield part
        if at != entry["at"] + entry["nbytes"] or digest.hexdigest() != entry["digest"]:
            number = self.entries.index(entry) + 1
            raise ValueError(
                f"entry {number} of {len(self.entries)} is damaged: the checksum is wrong"
            )

    def check(self, entry: Described) -> None:
        """Read an entry for its checksum alone; raises as ``read`` does."""
        whole, rest = divmod(entry["nbytes"], PIECE)
        for _ in self.read(entry, [PIECE] * whole + [rest] * (rest > 0)):
            pass

    def _check_place(self, entry: Described) -> None:
        at, size = entry["at"], entry["nbytes"]
        if not (type(at) is type(size) is int and self._start <= at <= at + size <= self._end):
            raise ValueError("an entry is where nothing is")

    def _read(self, start: int, end: int) -> memoryview:
        if not self._start <= start <= end <= self._size:
            raise ValueError("its end is missing")
        data = memoryview(bytearray(end - start))
        self._fill(start, data)
        return data

    def _fill(self, start: int, data: memoryview) -> None:
        self._file.seek(start)
        if self._file.readinto(data) != len(data):
            raise ValueError("it has become shorter while it was read")

    def _check_oldest(self, beginning: bytes) -> None:
        """Raise ``WrongFormat`` if an older version has written it, as a safetensors file."""
        if beginning[8:9] != b"{":
            return
        size = int.from_bytes(beginning[:8], "little")
        if size > min(self._size, _MOST_OLD):
            return
        header = bytearray(size)
        self._fill(8, memoryview(header))
        metadata = json.loads(header).get("__metadata__", {})
        raise WrongFormat(json.loads(metadata[_OLDEST_KEY])["format"])
