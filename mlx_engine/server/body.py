"""Bodies of requests, and what becomes of a request whose client goes away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel

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


async def while_connected(receive: Receive, *work: Callable[[], Awaitable[object]]) -> None:
    """Do the first of ``work`` to its end, and the others as long as that takes.

    This is the one place where a client that goes away is a cancellation. All work is cancelled
    then, in a scope of anyio's, and is over when this returns: a stream of an engine that is
    cancelled, or left with ``async with``, is out of MLX then.

    Raises:
        ClientGone: the client has gone away before the end, or one of ``work`` has seen so.
        BaseException: whatever the first one raises.
    """
    first, *others = work
    gone = done = False
    errors: list[Exception] = []

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            await anyio.lowlevel.checkpoint()  # some servers never stop saying that that was all
        gone = not done  # a response that is complete ends the connection, too

    async def do(which: Callable[[], Awaitable[object]], ends: bool) -> None:
        nonlocal done
        try:
            await which()
            done = done or which is first
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
            ends = True
        if ends:
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(do, watch, True)
        for other in others:
            group.start_soon(do, other, False)
        await do(first, True)
    if errors:
        raise errors[0]
    if gone:
        raise ClientGone
