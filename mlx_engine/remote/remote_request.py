"""A request to an engine elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.stream import Emit
from mlx_engine.outputs import GenerationChunk, GenerationResult, ProgressCallback, Timings, Usage
from mlx_engine.remote.calls import Call
from mlx_engine.remote.wire.values import ask_to_wire, check_processors
from mlx_engine.requests import GenerationRequest

if TYPE_CHECKING:
    from mlx_engine.remote.linked import LinkedEngine

# What there is of an answer of which nothing is known.
NOTHING = GenerationResult(
    text="",
    tokens=(),
    finish_reason="cancelled",
    usage=Usage(0, 0),
    timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


class RemoteRequest:
    """A request as its caller or stream sees it."""

    def __init__(
        self,
        engine: LinkedEngine,
        ask: GenerationRequest,
        on_progress: ProgressCallback | None,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self._engine = engine
        self._ask = ask
        self._on_progress = on_progress
        self._call: Call | None = None
        self._cancelled = False
        self._chunks: list[GenerationChunk] = []
        check_processors(ask.params)

    async def run(self, emit: Emit | None) -> GenerationResult:
        """Have it done, and give its result."""
        if self._cancelled:  # before it was read
            self._engine.check_running()
            return self.partial_result()

        def frame(number: int) -> bytes:
            return ask_to_wire(
                number,
                self._ask,
                name=self.request_id,
                limit=self._engine.frame_limit,
                stream=emit is not None,
                progress=self._on_progress is not None,
            )

        def emit_and_keep(chunk: GenerationChunk) -> None:
            assert emit is not None
            self._chunks.append(chunk)
            emit(chunk)

        result = await self._engine._ask(
            InFlight(self.request_id, reported=True),
            frame,
            None if emit is None else emit_and_keep,
            self._on_progress,
            self._keep_call,
        )
        assert isinstance(result, GenerationResult)
        return replace(result, request_id=self.request_id)

    def cancel(self) -> None:
        """Ask it to stop. From any thread; returns at once."""
        self._cancelled = True  # and then the look whether it is under way; see _keep_call
        connection = self._engine._connection
        if self._call is not None and connection is not None:
            connection.calls.ask_to_cancel(self._call)

    def partial_result(self) -> GenerationResult:
        """What there is of the answer, once it has been cancelled and is over."""
        partial = None if self._call is None else self._call.partial
        if partial is None:  # the engine is gone
            tokens = tuple(token for chunk in self._chunks for token in chunk.tokens)
            text = "".join(chunk.text for chunk in self._chunks if chunk.segment == "content")
            usage = Usage(prompt_tokens=0, completion_tokens=len(tokens))
            partial = replace(NOTHING, text=text, tokens=tokens, usage=usage)
        return replace(partial, request_id=self.request_id)

    def _keep_call(self, call: Call) -> None:
        self._call = call  # and then the look whether it is cancelled; see cancel
        if self._cancelled:
            self.cancel()
