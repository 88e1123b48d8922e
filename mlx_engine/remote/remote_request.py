"""A request to an engine elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.stream import Emit
from mlx_engine.outputs import (
    GenerationChunk,
    GenerationResult,
    ProgressCallback,
    Timings,
    ToolCall,
    Usage,
)
from mlx_engine.remote.calls import Call
from mlx_engine.remote.client import Client
from mlx_engine.remote.wire.values import check_processors, request_to_wire
from mlx_engine.requests import GenerationRequest

# An answer of which nothing is known.
NOTHING = GenerationResult(
    text="",
    tokens=(),
    finish_reason="cancelled",
    usage=Usage(0, 0),
    timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


class RemoteRequest:
    """A request at work elsewhere, as its caller or stream sees it; a ``Producer``."""

    def __init__(
        self,
        client: Client,
        request: GenerationRequest,
        on_progress: ProgressCallback | None,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self._client = client
        self._request = request
        self._on_progress = on_progress
        self._call: Call | None = None
        self._cancelled = False
        self._chunks: list[GenerationChunk] = []
        check_processors(request.params)

    async def run(self, emit: Emit | None) -> GenerationResult:
        """See ``Producer``."""
        client = self._client
        client.lifecycle.check_running()
        if self._cancelled:  # before it was read
            return self.partial_result()
        number = client.new_number()
        # The frame is named nowhere: once it is sent, nobody holds it.
        call = self._call = client.ask(
            InFlight(self.request_id, reported=True),
            number,
            request_to_wire(
                number,
                self._request,
                name=self.request_id,
                limit=client.frame_limit,
                stream=emit is not None,
                progress=self._on_progress is not None,
            ),
            None if emit is None else self._emit_to(emit),
            self._on_progress,
        )
        if self._cancelled:  # and ``cancel`` has not seen the call; it looks after that
            call.cancel()
        result: GenerationResult = await call.answer()
        return replace(result, request_id=self.request_id)

    def cancel(self) -> None:
        """See ``Producer``."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def partial_result(self) -> GenerationResult:
        """See ``Producer``."""
        partial = None if self._call is None else self._call.partial
        if partial is None:  # the engine is gone
            tokens = tuple(token for chunk in self._chunks for token in chunk.tokens)
            text = "".join(chunk.content for chunk in self._chunks)
            reasoning = "".join(chunk.reasoning for chunk in self._chunks)
            usage = Usage(prompt_tokens=0, completion_tokens=len(tokens))
            partial = replace(
                NOTHING,
                text=text,
                reasoning=reasoning,
                tool_calls=_calls_in(self._chunks),
                tokens=tokens,
                usage=usage,
            )
        return replace(partial, request_id=self.request_id)

    def _emit_to(self, emit: Emit) -> Emit:
        """``emit``, which keeps the chunks here as well."""

        def emit_and_keep(chunk: GenerationChunk) -> None:
            self._chunks.append(chunk)
            emit(chunk)

        return emit_and_keep


def _calls_in(chunks: Iterable[GenerationChunk]) -> tuple[ToolCall, ...]:
    """The calls that chunks are of; none of them may be made, since any may be incomplete."""
    calls: dict[int, ToolCall] = {}
    texts: defaultdict[int, list[str]] = defaultdict(list)
    index = 0
    for chunk in chunks:
        if chunk.segment != "tool_call":
            continue
        if (delta := chunk.tool_call) is not None:
            index = delta.index
            call = calls.get(index, ToolCall(error="the engine is gone, and the call may go on"))
            calls[index] = replace(
                call,
                name=delta.name or call.name,
                error=delta.error or call.error,
                id=delta.id or call.id,
            )
        texts[index].append(chunk.text)
    return tuple(replace(call, raw="".join(texts[number])) for number, call in calls.items())
