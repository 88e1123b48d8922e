"""The event loop of whoever awaits something here: asyncio's."""

from __future__ import annotations

import asyncio


def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop.

    Raises:
        RuntimeError: there is none, or it is another library's, as under anyio on trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "mlx_engine needs a running asyncio event loop: await it within asyncio.run(), or, "
            "with anyio, on the backend 'asyncio' rather than 'trio'"
        ) from None
