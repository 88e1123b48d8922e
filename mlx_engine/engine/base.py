"""The common half of all engines: answers, whole, as streams, and many at once.

No MLX here: an engine may be in this process or elsewhere.
"""

from __future__ import annotations

import abc
import asyncio
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from mlx_engine.chat.formats import choose_format
from mlx_engine.checks import checked_path, shown
from mlx_engine.config import EngineConfig, QueueConfig
from mlx_engine.core.drain import clean_up
from mlx_engine.core.log import logged
from mlx_engine.core.stream import GenerationStream, Producer
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.interface import Engine
from mlx_engine.engine.many import at_once, in_order, made_once, params_for_each
from mlx_engine.errors import InvalidRequest, MLXEngineError
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import (
    GenerationResult,
    ProgressCallback,
    RenderedChat,
    ShutdownReport,
)
from mlx_engine.params import SamplingOptions, SamplingParams
from mlx_engine.questions import (
    PromptFacts,
    PromptQuestion,
    check_plain,
    is_chat,
    renamed,
    text_to_encode,
    tokens_to_decode,
)
from mlx_engine.requests import (
    ChatPrompt,
    GenerationRequest,
    Message,
    TextPrompt,
    ToolChoice,
    checked_priority,
)
from mlx_engine.strategies import EngineDefault, SpecPrefill

T = TypeVar("T")


class BaseEngine(Engine, abc.ABC):
    """A model behind ``await``.

    Use it as ``async with Engine(model) as engine:``, or call ``start()`` and ``stop()``.
    It may be used from several event loops at once. They are asyncio's: what is awaited in
    another one, as under anyio on trio, raises ``RuntimeError``.

    Attributes:
        limits: how large a request may be.
        queue_limits: how many may wait, and how long, as far as that is known here.
        takes_priority: whether requests may have another priority than 0.
    """

    limits: RequestLimits = DEFAULT_LIMITS
    queue_limits: QueueConfig = QueueConfig()
    _entered_in: asyncio.AbstractEventLoop | None = None
    takes_priority: bool = True

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Requests that can be in work at once. From any thread."""

    @abc.abstractmethod
    def check_running(self) -> None:
        """Raise the error that tells why requests are refused, unless they are taken.

        Raises:
            EngineNotStarted, EngineStopped, EngineDead: by the state.
            RuntimeError: this process is a fork of the one in which the engine was started.
        """

    @abc.abstractmethod
    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> Producer:
        """Make of ``request`` what does it, once its ``run`` is awaited.

        Args:
            request: what is asked.
            on_progress: told of the prefill, in the event loop in which it is run.
            request_id: its name, if its caller has given it one; no other in flight has it.

        Raises:
            InvalidRequest: it asks for what this engine was not made for.
        """

    @abc.abstractmethod
    async def answer(self, question: PromptQuestion) -> PromptFacts:
        """Answer a question about a prompt, beside all requests: it takes no turn.

        Cancellation and errors are those of ``count_tokens``.
        """

    async def stop(self) -> ShutdownReport:
        return await self.shutdown(0)

    async def __aenter__(self) -> Self:
        await self.start()
        self._entered_in = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        home = self._entered_in or asyncio._get_running_loop()
        await clean_up(exc, self.stop, home)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        prefill: SpecPrefill | EngineDefault | None = "default",
        decode: EngineDefault | None = "default",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        running_loop()
        source = TextPrompt.of(prompt, self.limits)
        ask = GenerationRequest(
            source, self.limits.params(params, options), priority, prefill, decode
        )
        producer = self.submit(ask, checked_callback(on_progress))
        return await logged(producer.request_id, producer.run(None))

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        prefill: SpecPrefill | EngineDefault | None = "default",
        decode: EngineDefault | None = "default",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        source = TextPrompt.of(prompt, self.limits)
        ask = GenerationRequest(
            source, self.limits.params(params, options), priority, prefill, decode
        )
        return GenerationStream(self.submit(ask, checked_callback(on_progress)))

    async def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool | None = None,
        max_reasoning_tokens: int | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        prefill: SpecPrefill | EngineDefault | None = "default",
        decode: EngineDefault | None = "default",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult:
        running_loop()
        source = ChatPrompt.of(
            messages,
            tools,
            chat_template_kwargs,
            self.limits,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            max_reasoning_tokens=max_reasoning_tokens,
            continue_final_message=continue_final_message,
        )
        ask = GenerationRequest(
            source, self.limits.params(params, options), priority, prefill, decode
        )
        producer = self.submit(ask, checked_callback(on_progress))
        return await logged(producer.request_id, producer.run(None))

    def stream_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool | None = None,
        max_reasoning_tokens: int | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        prefill: SpecPrefill | EngineDefault | None = "default",
        decode: EngineDefault | None = "default",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        source = ChatPrompt.of(
            messages,
            tools,
            chat_template_kwargs,
            self.limits,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            max_reasoning_tokens=max_reasoning_tokens,
            continue_final_message=continue_final_message,
        )
        ask = GenerationRequest(
            source, self.limits.params(params, options), priority, prefill, decode
        )
        return GenerationStream(self.submit(ask, checked_callback(on_progress)))

    async def count_tokens(
        self,
        prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any] | GenerationResult],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool | None = None,
        max_reasoning_tokens: int | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> int:
        running_loop()
        source: TextPrompt | ChatPrompt
        if is_chat(prompt):
            source = ChatPrompt.of(
                prompt,
                tools,
                chat_template_kwargs,
                self.limits,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                thinking=thinking,
                max_reasoning_tokens=max_reasoning_tokens,
                continue_final_message=continue_final_message,
            )
        else:
            check_plain(
                tools=bool(tools),
                tool_choice=tool_choice not in ("auto", None),
                parallel_tool_calls=parallel_tool_calls not in (True, None),
                thinking=thinking is not None,
                max_reasoning_tokens=max_reasoning_tokens is not None,
                continue_final_message=bool(continue_final_message),
                chat_template_kwargs=bool(chat_template_kwargs),
            )
            source = TextPrompt.of(prompt, self.limits)
        return (await self.answer(PromptQuestion("count_tokens", source))).count

    async def render_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool | None = None,
        max_reasoning_tokens: int | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        running_loop()
        source = ChatPrompt.of(
            messages,
            tools,
            chat_template_kwargs,
            self.limits,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
            max_reasoning_tokens=max_reasoning_tokens,
            continue_final_message=continue_final_message,
        )
        facts = await self.answer(PromptQuestion("render_chat", source))
        return RenderedChat(facts.text, facts.tokens, facts.cached_tokens, facts.notes)

    async def encode(self, text: str) -> list[int]:
        running_loop()
        if (source := text_to_encode(text, self.limits)) is None:
            self.check_running()
            return []
        try:
            facts = await self.answer(PromptQuestion("encode", source))
        except InvalidRequest as error:
            raise renamed(error, "text") from error
        return list(facts.tokens)

    async def decode(self, tokens: Sequence[int]) -> str:
        running_loop()
        if (source := tokens_to_decode(tokens, self.limits)) is None:
            self.check_running()
            return ""
        try:
            facts = await self.answer(PromptQuestion("decode", source))
        except InvalidRequest as error:
            raise renamed(error, "tokens") from error
        return facts.text

    async def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        priority: int = 0,
        prefill: SpecPrefill | EngineDefault | None = "default",
        decode: EngineDefault | None = "default",
        on_progress: ProgressCallback | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult | MLXEngineError]:
        running_loop()
        checked_priority(priority, self.takes_priority)
        self.check_strategies(prefill, decode)
        given = params_for_each(prompts, params)
        self.check_running()
        each = await made_once(given, lambda own: self.limits.params(own, options))

        async def one(prompt: str | Sequence[int], own: SamplingParams) -> GenerationResult:
            return await self.generate(
                prompt, own, priority=priority, prefill=prefill, decode=decode
            )

        calls = [functools.partial(one, *pair) for pair in zip(prompts, each, strict=True)]
        return await in_order(
            calls, at_once(self.width, self.queue_limits), checked_callback(on_progress)
        )

    async def save_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        running_loop()
        return await self._save_prompt_cache(checked_path(path))

    async def load_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        running_loop()
        return await self._load_prompt_cache(checked_path(path))

    @abc.abstractmethod
    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        """Raise ``InvalidRequest`` if a request may not ask for these."""

    @abc.abstractmethod
    async def _save_prompt_cache(self, path: Path) -> int:
        """See ``save_prompt_cache``."""

    @abc.abstractmethod
    async def _load_prompt_cache(self, path: Path) -> int:
        """See ``load_prompt_cache``."""


def checked_formats(config: EngineConfig) -> EngineConfig:
    """``config``, if there are the formats that it names; raises ``InvalidRequest`` if not."""
    model = config.model
    choose_format(None, tool_format=model.tool_format, reasoning_format=model.reasoning_format)
    return config


def checked_callback(on_progress: ProgressCallback | None) -> ProgressCallback | None:
    """``on_progress``, if it can be called; raises ``InvalidRequest`` if not."""
    if on_progress is not None and not callable(on_progress):
        raise InvalidRequest("on_progress", f"must be callable or None, not {shown(on_progress)}")
    return on_progress
