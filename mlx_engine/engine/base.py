"""What all engines offer: answers, whole, as streams, and many at once."""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

from mlx_engine.config import AsEngine, SpecPrefill
from mlx_engine.engine.admission import RequestTicket
from mlx_engine.engine.crossing import in_this_loop
from mlx_engine.engine.life import EngineLife, checked_callback
from mlx_engine.engine.many import in_order, params_for_each
from mlx_engine.errors import InvalidRequest, MLXEngineError
from mlx_engine.generation import prompt_cache_file
from mlx_engine.generation.kv_cache import sample_kv_cache
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
        priority: int = 0,
        prefill: SpecPrefill | AsEngine | None = "as engine",
        decode: AsEngine | None = "as engine",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """Continue ``prompt``, and give the whole answer.

        Args:
            prompt: text, or token ids.
            params: sampling parameters.
            priority: lower goes first; 0 is all that ``SimpleEngine`` takes.
            prefill: ``None`` prefills all of this prompt; ``SpecPrefill(...)`` changes what
                an engine keeps that has been made with one.
            decode: ``None`` decodes this answer one token after another.
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
        request = self._request(
            TextInput(prompt), params, options, priority, prefill, decode, on_progress
        )
        return await self._complete(request)

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        prefill: SpecPrefill | AsEngine | None = "as engine",
        decode: AsEngine | None = "as engine",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Continue ``prompt`` as a stream; arguments and errors are those of ``generate``.

        The request starts, and its state and queue errors are raised, when the stream is
        entered or first read.
        """
        return self._stream(
            self._request(
                TextInput(prompt), params, options, priority, prefill, decode, on_progress
            )
        )

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        prefill: SpecPrefill | AsEngine | None = "as engine",
        decode: AsEngine | None = "as engine",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """Answer a conversation in the model's chat template.

        Args:
            messages: mappings with ``role`` and ``content``, as in OpenAI's API.
            params: sampling parameters.
            tools: descriptions of the tools that the model may call, as in OpenAI's API.
            chat_template_kwargs: passed to the template, e.g. ``{"enable_thinking": False}``.
            priority: lower goes first; 0 is all that ``SimpleEngine`` takes.
            prefill: ``None`` prefills all of this prompt; ``SpecPrefill(...)`` changes what
                an engine keeps that has been made with one.
            decode: ``None`` decodes this answer one token after another.
            on_progress: told of the prefill, in this event loop.
            options: fields of ``SamplingParams``; they go before ``params``.

        Cancellation and errors are those of ``generate``; a model without a chat template,
        or a template without tools, is an ``InvalidRequest``.
        """
        source = ChatInput(messages, tools, chat_template_kwargs)
        return await self._complete(
            self._request(source, params, options, priority, prefill, decode, on_progress)
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        prefill: SpecPrefill | AsEngine | None = "as engine",
        decode: AsEngine | None = "as engine",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Answer a conversation as a stream; arguments and errors are those of ``chat``."""
        source = ChatInput(messages, tools, chat_template_kwargs)
        return self._stream(
            self._request(source, params, options, priority, prefill, decode, on_progress)
        )

    async def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        priority: int = 0,
        prefill: SpecPrefill | AsEngine | None = "as engine",
        decode: AsEngine | None = "as engine",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult | MLXEngineError]:
        """Continue many prompts, as many at once as the engine can.

        Args:
            prompts: texts, or lists of token ids.
            params: sampling parameters of all, or a list with those of each.
            priority: lower goes first; 0 is all that ``SimpleEngine`` takes.
            prefill: as in ``generate``, for all.
            decode: as in ``generate``, for all.
            on_progress: told in this event loop how many requests are over.
            options: fields of ``SamplingParams`` for all; they go before ``params``.

        Returns:
            For each prompt, in order, its result, or the error with which it failed: one that
            fails costs no other its result.

        At most as many requests as can be in work at once are in the queue at any time.

        Cancellation: all requests are cancelled; ``CancelledError`` is raised when they are
        out of MLX.

        Raises:
            InvalidRequest: an argument is not acceptable for any prompt.
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state, at the call.
        """
        checked_priority(priority)
        self.strategies.of_request(prefill, decode)
        each = [SamplingParams.of(own, **options) for own in params_for_each(prompts, params)]
        self._lifecycle.check_running()

        async def one(prompt: str | Sequence[int], own: SamplingParams) -> GenerationResult:
            return await self.generate(
                prompt, own, priority=priority, prefill=prefill, decode=decode
            )

        calls = [functools.partial(one, *pair) for pair in zip(prompts, each, strict=True)]
        return await in_order(calls, self._width, checked_callback(on_progress))

    async def save_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        """Write the prompt cache into a file, for an engine with the same model to load.

        Whatever happens meanwhile, ``path`` has either the old file or the new one.

        Returns:
            The number of prompts written.

        Cancellation: waiting for its turn, it leaves at once; once it writes, it does so to
        the end, and then raises ``CancelledError``.

        Raises:
            InvalidRequest: the file cannot be written.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
        """
        ticket = RequestTicket(self._lifecycle.new_id("save"))
        return await self._run_blocking_serialized(self._save, checked_path(path), _ticket=ticket)

    async def load_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        """Add the prompts of a file that ``save_prompt_cache`` has written.

        If there are more than the prompt cache may hold, those used last are kept.

        Returns:
            The number of prompts added.

        Cancellation: as in ``save_prompt_cache``.

        Raises:
            InvalidRequest: there is no such file, it is damaged, or of another model or
                other KV cache options; the prompt cache is as it was.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
        """
        ticket = RequestTicket(self._lifecycle.new_id("load"))
        return await self._run_blocking_serialized(self._load, checked_path(path), _ticket=ticket)

    def _save(self, path: Path) -> int:
        """On the MLX thread."""
        space = self._slot.space()
        return prompt_cache_file.save(
            path, space.prompt_cache, prompt_cache_file.fingerprint(space.loaded)
        )

    def _load(self, path: Path) -> int:
        """On the MLX thread."""
        space = self._slot.space()
        return prompt_cache_file.load(
            path,
            space.prompt_cache,
            prompt_cache_file.fingerprint(space.loaded),
            sample_kv_cache(space.loaded.model, space.config),
        )

    @property
    def _width(self) -> int:
        """Requests that can be in work at once."""
        return 1

    async def _complete(self, request: Request, emit: Emit | None = None) -> GenerationResult:
        request.submitted(in_this_loop, emit)
        return await self._serve(request, RequestTicket(request.request_id))

    @abc.abstractmethod
    async def _serve(self, request: Request, ticket: RequestTicket) -> GenerationResult:
        """Do a request that somebody waits for."""

    def _stream(self, request: Request) -> GenerationStream:
        return GenerationStream(_Producer(self, request))

    def _request(
        self,
        source: Input,
        params: SamplingParams | None,
        options: SamplingOptions,
        priority: int,
        prefill: SpecPrefill | AsEngine | None,
        decode: AsEngine | None,
        on_progress: ProgressCallback | None,
    ) -> Request:
        return Request(
            source,
            SamplingParams.of(params, **options),
            self._lifecycle.new_id(),
            checked_callback(on_progress),
            checked_priority(priority),
            self.strategies.of_request(prefill, decode),
        )


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


def checked_priority(priority: int) -> int:
    """``priority``, if it can be one; raises ``InvalidRequest`` if not."""
    if not isinstance(priority, Integral) or isinstance(priority, bool):
        raise InvalidRequest("priority", f"must be an integer, not {priority!r}")
    return int(priority)


def checked_path(path: str | os.PathLike[str]) -> Path:
    """``path``, if it can be one; raises ``InvalidRequest`` if not."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InvalidRequest("path", f"must be the path of a file, not {path!r}")
    return Path(path).expanduser()
