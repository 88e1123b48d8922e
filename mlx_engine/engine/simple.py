"""One request at a time."""

from __future__ import annotations

from mlx_engine.engine.admission import RequestTicket
from mlx_engine.engine.base import BaseEngine
from mlx_engine.generation.request import Request
from mlx_engine.outputs import GenerationResult
from mlx_engine.stream import Emit


class SimpleEngine(BaseEngine):
    """Serves one request at a time, in the order in which they come.

    A request is one call on the MLX thread, from its prompt to its last token.
    """

    async def _serve(
        self, request: Request, ticket: RequestTicket, emit: Emit | None
    ) -> GenerationResult:
        return await self._run_blocking_serialized(
            self._generate, request, emit, on_cancel=request.cancel, _ticket=ticket
        )

    def _generate(self, request: Request, emit: Emit | None) -> GenerationResult:
        """On the MLX thread."""
        return request.run(self._slot.get(), self.config, emit)
