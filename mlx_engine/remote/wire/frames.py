"""Frames on a byte stream: four bytes of length, big-endian, and then so many bytes."""

from __future__ import annotations

from collections.abc import Iterator

MAX_FRAME = 128 * 2**20  # bytes
MAX_CLIENT_FRAME = 8 * 2**20  # of a host's clients; a prompt of a million token ids takes 5 MB

_HEADER = 4


class WireError(Exception):
    """Bytes that are not what this library says came over the wire."""


def framed(payload: bytes) -> bytes:
    """A payload as it goes over the wire.

    Raises:
        WireError: it is longer than a frame may be.
    """
    if len(payload) > MAX_FRAME:
        raise WireError(f"{len(payload)} bytes are more than a frame may have ({MAX_FRAME})")
    return len(payload).to_bytes(_HEADER, "big") + payload


class FrameSplitter:
    """Cuts what arrives into frames.

    Args:
        limit: bytes that a frame may have.

    Attributes:
        limit: the same; it may be changed.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._needed = _HEADER

    def __len__(self) -> int:
        """Bytes that have arrived and are not taken yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add what has arrived, and yield the payload of each frame that is complete.

        Raises:
            WireError: see ``pop``.
        """
        self.push(data)
        while (payload := self.pop()) is not None:
            yield payload

    def push(self, data: bytes) -> None:
        """Add what has arrived."""
        self._buffer += data

    def pop(self) -> bytes | None:
        """The payload of the next frame, once it is complete.

        Raises:
            WireError: a frame is announced that is too long; memory for it was never taken.
        """
        if len(self._buffer) < self._needed:
            return None
        size = int.from_bytes(self._buffer[:_HEADER], "big")
        if size > self.limit:
            raise WireError(f"a frame of {size} bytes is announced; {self.limit} is the most")
        end = self._needed = _HEADER + size
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[_HEADER:end])
        del self._buffer[:end]
        self._needed = _HEADER
        return payload

    def clear(self) -> None:
        """Forget what has arrived: nobody will take it."""
        self._buffer = bytearray()
        self._needed = _HEADER
