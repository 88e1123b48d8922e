"""The log: what engines and requests do, and never a prompt or an answer.

No handler is installed, and nothing is done where nobody listens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable

from mlx_engine.outputs import GenerationResult

LOG = logging.getLogger("mlx_engine")


def logged(request_id: str, work: Awaitable[GenerationResult]) -> Awaitable[GenerationResult]:
    """``work`` on a request; its end goes to the log, at DEBUG."""
    return _logged(request_id, work) if LOG.isEnabledFor(logging.DEBUG) else work


async def _logged(request_id: str, work: Awaitable[GenerationResult]) -> GenerationResult:
    began = time.perf_counter()
    try:
        result = await work
    except BaseException as error:
        how = "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
        LOG.debug("%s: %s, %.3f s", request_id, how, time.perf_counter() - began)
        raise
    LOG.debug(
        "%s: %s, %d tokens after %d (%d of them cached), %.3f s",
        request_id,
        result.finish_reason,
        result.usage.completion_tokens,
        result.usage.prompt_tokens,
        result.usage.cached_tokens,
        time.perf_counter() - began,
    )
    return result
