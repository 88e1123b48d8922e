"""The first word of a client, which is looked at before anything else of it is believed."""

from __future__ import annotations

from typing import Any

import msgspec

from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.messages import MAGIC, VERSION, Hello

MAX_HELLO = 4096  # bytes


def check_hello(frame: bytes) -> None:
    """See that a client says hello, in whatever version; nothing else of it is looked at.

    Raises:
        WireError: it does not, or in another version.
    """
    said: Any = None
    if len(frame) <= MAX_HELLO:
        try:
            said = msgspec.msgpack.decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            pass
    hello = said[0] if isinstance(said, list) and said else None
    if not (
        isinstance(hello, list)
        and len(hello) >= 3
        and hello[:2] == [Hello.__name__.lower(), MAGIC]
        and type(version := hello[2]) is int
    ):
        raise WireError("that is no greeting of mlx_engine")
    if version != VERSION:
        older = "host" if version > VERSION else "client"
        raise WireError(
            f"this host speaks version {VERSION}, the client speaks {version}: upgrade the {older}"
        )
    if len(said) > 1:
        raise WireError("a client waits for an answer to its greeting")
