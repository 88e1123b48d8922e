"""Work for a client, which is cancelled when that goes away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel

from mlx_engine.server.reply import ClientGone, Receive


async def do_while_connected(receive: Receive, *work: Callable[[], Awaitable[object]]) -> None:
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
