"""Bodies of requests."""

from __future__ import annotations

import re

import anyio
import msgspec

from mlx_engine.errors import InvalidRequest
from mlx_engine.server.failures import Failure
from mlx_engine.server.reply import ClientGone, Receive

# An escaped backslash or a whole pair of surrogates, which stay; or half of a pair.
_SURROGATES = re.compile(
    rb"""\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"""
    rb"""|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"""
)


async def read_json(receive: Receive, most: int, seconds: float, declared: bytes = b"") -> object:
    """The JSON value that a body is.

    Half of a surrogate pair is read as U+FFFD: agents cut the output of tools wherever their limit
    is, and have that in their conversation from then on.

    Args:
        most: bytes.
        seconds: that it may take to come.
        declared: how long it is to be, if its head tells: a body that is too large is refused
            before any of it is read.

    Raises:
        ClientGone: it has not come to its end.
        Failure: it is too large, or too slow.
        InvalidRequest: it is no JSON.
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
    try:
        return _decoded(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", f"is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deep") from error


def _decoded(body: bytearray) -> object:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        whole = _SURROGATES.sub(_replaced, body)
        if whole == body:
            raise
        return msgspec.json.decode(whole)


def _replaced(found: re.Match[bytes]) -> bytes:
    return found[0] if found[1] is None else rb"\ufffd"


def _too_large(most: int) -> Failure:
    return Failure("too_large", f"the body is larger than {most} bytes")
