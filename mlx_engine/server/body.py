"""Bodies of requests."""

from __future__ import annotations

import anyio
import msgspec

from mlx_engine.errors import InvalidRequest
from mlx_engine.server.failures import Failure
from mlx_engine.server.reply import ClientGone, Receive


async def read_json(receive: Receive, most: int, seconds: float) -> object:
    """The JSON value that a body is.

    Args:
        most: bytes.
        seconds: that it may take to come.

    Raises:
        ClientGone: it has not come to its end.
        Failure: it is too large, or too slow.
        InvalidRequest: it is no JSON.
    """
    body = bytearray()
    with anyio.move_on_after(seconds) as limit:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > most:
                raise Failure("too_large", f"the body is larger than {most} bytes")
            more = message.get("more_body", False)
    if limit.cancelled_caught:
        raise Failure("slow", f"the body has not come within {seconds:g} s")
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", f"is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deep") from error
