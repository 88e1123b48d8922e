"""A request as a stream sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mlx_engine.core.scheduler import Schedulable
from mlx_engine.core.stream import Emit
from mlx_engine.outputs import GenerationResult


class RequestProducer:
    """Makes the chunks of a request to an engine in this process.

    Args:
        request: what is asked.
        complete: does it, calling what it is given with each chunk.
    """

    def __init__(
        self,
        request: Schedulable,
        complete: Callable[[Emit | None], Awaitable[GenerationResult]],
    ) -> None:
        self.request_id = request.request_id
        self._request = request
        self._complete = complete

    async def run(self, emit: Emit | None) -> GenerationResult:
        """See ``Producer``."""
        return await self._complete(emit)

    def cancel(self) -> None:
        """See ``Producer``."""
        self._request.cancel()

    def partial_result(self) -> GenerationResult:
        """See ``Producer``."""
        return self._request.result()
