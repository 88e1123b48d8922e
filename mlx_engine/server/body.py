"""Bodies of requests."""

from __future__ import annotations

import anyio

from mlx_engine.server.failures import Failure
from mlx_engine.server.json_body import decoded
from mlx_engine.server.reply import ClientGone, Receive


async def read_json(receive: Receive, most: int, seconds: float, declared: bytes = b"") -> object:
    """The JSON value that a body is.

    Args:
        most: bytes.
        seconds: that it may take to come.
        declared: how long it is to be, if its head tells: a body that is too large is refused
            before any of it is read.

    Raises:
        ClientGone: it has not come to its end.
        Failure: it is too large, or too slow.
        InvalidRequest: it is no JSON, or has too many values.
    """
    if declared.isdigit() and int(declared[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    with anyio.move_on_after(seconds) as limit:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > most:
                raise _too_large(most)
            more = message.get("more_body", False)
    if limit.cancelled_caught:
        raise Failure("slow", f"the body has not come within {seconds:g} s")
    return decoded(body)


def _too_large(most: int) -> Failure:
    return Failure("too_large", f"the body is larger than {most} bytes")
