"""What all engines offer: answers, whole and as streams."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from mlx_engine.engine.admission import RequestTicket
from mlx_engine.engine.crossing import in_this_loop
from mlx_engine.engine.life import EngineLife, checked_callback
from mlx_engine.generation.prompt import ChatInput, Input, TextInput
from mlx_engine.generation.request import Request
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.params import SamplingOptions, SamplingParams
from mlx_engine.stream import Emit, GenerationStream


class BaseEngine(EngineLife, abc.ABC):
    """A model behind ``await``; the MLX thread does its work, one piece at a time.

    Use it as ``async with Engine(model) as engine:``, or call ``start()`` and ``stop()``.
    It may be used from several event loops at once.
    """

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """Continue ``prompt``, and give the whole answer.

        Args:
            prompt: text, or token ids.
            params: sampling parameters.
            on_progress: told of the prefill, in this event loop.
            options: fields of ``SamplingParams``; they go before ``params``.

        Cancellation: a request that waits leaves the queue at once. One that runs stops at
        its next token or prefill chunk; ``CancelledError`` is raised when it is out of MLX.

        Raises:
            InvalidRequest, ContextLengthExceeded: the prompt or an option is not acceptable.
            EngineBusy: the queue or wait limit is reached.
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state.
            GenerationError: this request failed; others go on.
        """
        request = self._request(TextInput(prompt), params, options, on_progress)
        return await self._complete(request)

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Continue ``prompt`` as a stream; arguments and errors are those of ``generate``.

        The request starts, and its state and queue errors are raised, when the stream is
        entered or first read.
        """
        return self._stream(self._request(TextInput(prompt), params, options, on_progress))

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """Answer a conversation in the model's chat template.

        Args:
            messages: mappings with ``role`` and ``content``, as in OpenAI's API.
            params: sampling parameters.
            tools: descriptions of the tools that the model may call, as in OpenAI's API.
            chat_template_kwargs: passed to the template, e.g. ``{"enable_thinking": False}``.
            on_progress: told of the prefill, in this event loop.
            options: fields of ``SamplingParams``; they go before ``params``.

        Cancellation and errors are those of ``generate``; a model without a chat template,
        or a template without tools, is an ``InvalidRequest``.
        """
        source = ChatInput(messages, tools, chat_template_kwargs)
        return await self._complete(self._request(source, params, options, on_progress))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Answer a conversation as a stream; arguments and errors are those of ``chat``."""
        source = ChatInput(messages, tools, chat_template_kwargs)
        return self._stream(self._request(source, params, options, on_progress))

    async def _complete(self, request: Request, emit: Emit | None = None) -> GenerationResult:
        request.submitted(in_this_loop)
        return await self._serve(request, RequestTicket(request.request_id), emit)

    @abc.abstractmethod
    async def _serve(
        self, request: Request, ticket: RequestTicket, emit: Emit | None
    ) -> GenerationResult:
        """Do a request, pushing its chunks to ``emit`` if there is one."""

    def _stream(self, request: Request) -> GenerationStream:
        return GenerationStream(_Producer(self, request))

    def _request(
        self,
        source: Input,
        params: SamplingParams | None,
        options: SamplingOptions,
        on_progress: ProgressCallback | None,
    ) -> Request:
        checked = SamplingParams.of(params, **options)
        told = checked_callback(on_progress)
        return Request(source, checked, self._lifecycle.new_id(), told)


class _Producer:
    """A request as a stream sees it."""

    def __init__(self, engine: BaseEngine, request: Request) -> None:
        self.request_id = request.request_id
        self._engine = engine
        self._request = request

    async def run(self, emit: Emit) -> GenerationResult:
        return await self._engine._complete(self._request, emit)

    def cancel(self) -> None:
        self._request.cancel()

    def partial_result(self) -> GenerationResult:
        return self._request.result()
