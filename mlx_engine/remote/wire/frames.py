"""Frames on a byte stream: four bytes of length, big-endian, and then so many bytes."""

from __future__ import annotations

from collections.abc import Iterator

MAX_FRAME = 128 * 2**20  # bytes
MAX_GUEST_FRAME = 8 * 2**20  # of a host's clients; a prompt of a million token ids takes 5 MB

_HEADER = 4


class WireError(Exception):
    """What came over the wire is not what this library says."""


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
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._needed = _HEADER

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add what has arrived, and yield the payload of each frame that is complete.

        Raises:
            WireError: a frame is announced that is too long; memory for it was never taken.
        """
        self._buffer += data
        while len(self._buffer) >= self._needed:
            size = int.from_bytes(self._buffer[:_HEADER], "big")
            if size > self._limit:
                raise WireError(f"a frame of {size} bytes is announced; {self._limit} is the most")
            end = _HEADER + size
            if len(self._buffer) < end:
                self._needed = end
                return
            payload = bytes(self._buffer[_HEADER:end])
            del self._buffer[:end]
            self._needed = _HEADER
            yield payload
