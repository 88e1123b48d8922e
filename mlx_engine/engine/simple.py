"""One request at a time."""

from __future__ import annotations

import functools

from mlx_engine.core.in_flight import RequestTicket
from mlx_engine.engine.local import LocalEngine
from mlx_engine.generation.request import Request
from mlx_engine.outputs import GenerationResult


class SimpleEngine(LocalEngine):
    """Serves one request at a time, in the order in which they come.

    A request is one call on the MLX thread, from its first prefill chunk to its last token; its
    prompt is made into tokens before, on another thread.
    """

    async def _serve(self, request: Request, ticket: RequestTicket) -> GenerationResult:
        return await self._run_blocking_serialized(
            self._generate,
            request,
            on_cancel=request.cancel,
            _ticket=ticket,
            _prepare=functools.partial(self._prepare, request),
        )

    def _generate(self, request: Request) -> GenerationResult:
        """On the MLX thread."""
        return self._holder.generate(request)
