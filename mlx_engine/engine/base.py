"""The common half of all engines: answers, whole, as streams, and many at once.

No MLX here: an engine may be in this process or elsewhere.
"""

from __future__ import annotations

import abc
import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from mlx_engine.chat.formats import choose_format
from mlx_engine.checks import checked_path, checked_time_limit, checked_wait
from mlx_engine.config import EngineConfig, QueueConfig
from mlx_engine.conversation import ANY_USER, LEADING
from mlx_engine.core.bridge import checked_callback
from mlx_engine.core.drain import clean_up
from mlx_engine.core.log import logged
from mlx_engine.core.stream import GenerationStream, PartialAnswer, Producer
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.guided import Guided
from mlx_engine.engine.interface import Engine
from mlx_engine.engine.many import in_order, made_once, mapped, params_for_each
from mlx_engine.engine.map_interface import asked
from mlx_engine.engine.sync import SyncEngine
from mlx_engine.engine.typed import OutputType, TypedWork, as_output, partial_answer
from mlx_engine.errors import InvalidRequest, MLXEngineError, renamed
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import (
    EngineState,
    GenerationResult,
    ProgressCallback,
    RenderedChat,
    ShutdownReport,
    Usage,
)
from mlx_engine.params import SamplingOptions, SamplingParams
from mlx_engine.questions import (
    PromptFacts,
    PromptQuestion,
    check_plain,
    is_chat,
    text_to_encode,
    tokens_to_decode,
)
from mlx_engine.requests import (
    ALL_DEFAULTS,
    ANSWER_DEFAULTS,
    ChatOptions,
    ChatPrompt,
    ChatRequestOptions,
    GenerationRequest,
    Message,
    Prompt,
    RequestOptions,
    TextPrompt,
    chat_prompt,
    check_known,
    checked_priority,
    generation_request,
    those_of,
)
from mlx_engine.signatures import spelled_out
from mlx_engine.strategies import EngineDefault, SpecPrefill

T = TypeVar("T")
Work = tuple[Producer, PartialAnswer | None]


class BaseEngine(Guided, Engine, abc.ABC):
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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.model!r}, {self.state}>"

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

    def sync(self) -> SyncEngine[Self]:
        """The same engine without ``await``, for scripts: its methods block.

        with SimpleEngine("demo").sync() as llm:
            print(llm.generate("The capital of France is").text)
        """
        return SyncEngine(self)

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

    @spelled_out(RequestOptions, ALL_DEFAULTS)
    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        running_loop()
        work, _ = self._text_work(prompt, params, options)
        return await logged(work.request_id, work.run(None))

    @spelled_out(RequestOptions, ALL_DEFAULTS)
    def stream_generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationStream:
        return GenerationStream(*self._text_work(prompt, params, options))

    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    async def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> GenerationResult:
        running_loop()
        work, _ = self._chat_work(messages, params, options)
        return await logged(work.request_id, work.run(None))

    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    def stream_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> GenerationStream:
        return GenerationStream(*self._chat_work(messages, params, options))

    def _text_work(
        self, prompt: object, params: SamplingParams | None, options: RequestOptions
    ) -> Work:
        check_known(options, RequestOptions)
        return self._work_on(TextPrompt.of(prompt, self.limits), params, options)

    def _chat_work(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None,
        options: ChatRequestOptions,
    ) -> Work:
        check_known(options, ChatRequestOptions)
        return self._work_on(chat_prompt(messages, options, self.limits), params, options)

    def _work_on(
        self,
        source: TextPrompt | ChatPrompt,
        params: SamplingParams | None,
        options: RequestOptions,
    ) -> Work:
        output = None if (given := options.get("output")) is None else OutputType.of(given)
        chosen = self._sampling(output, params, those_of(SamplingOptions, options))
        calls = isinstance(source, ChatPrompt) and source.tool_choice not in ("auto", "none")
        if calls and chosen.constraint is not None:
            raise InvalidRequest(
                "constraint" if output is None else "output",
                "is for content, and there is none where tool_choice asks for calls: ask for the "
                "call first, and for this in a request of its own",
            )
        work = self.submit(
            generation_request(source, chosen, options),
            checked_callback(options.get("on_progress")),
        )
        partial = None if chosen.constraint is None else partial_answer(chosen.constraint)
        if output is None:
            return work, partial
        sampled = not chosen.greedy and chosen.seed is None
        return TypedWork(work, output, sampled=sampled), partial

    def _sampling(
        self, output: OutputType | None, params: SamplingParams | None, options: Mapping[str, Any]
    ) -> SamplingParams:
        if output is None:
            return self.limits.params(params, options)
        with as_output():
            return self.limits.params(params, output.options(params, options))

    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def count_tokens(
        self,
        prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any] | GenerationResult],
        **options: Unpack[ChatOptions],
    ) -> int:
        running_loop()
        check_known(options, ChatOptions)
        source: TextPrompt | ChatPrompt
        if is_chat(prompt):
            source = chat_prompt(prompt, options, self.limits)
        else:
            check_plain(options)
            source = TextPrompt.of(prompt, self.limits)
        return (await self.answer(PromptQuestion("count_tokens", source))).count

    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def render_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        **options: Unpack[ChatOptions],
    ) -> RenderedChat:
        running_loop()
        check_known(options, ChatOptions)
        source = chat_prompt(messages, options, self.limits)
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

    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def warm(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> Usage:
        running_loop()
        check_known(options, ChatOptions)
        source = self._beginning(prompt, options)
        self.check_running()
        return await self._warm(GenerationRequest(source, SamplingParams(max_tokens=0)))

    def _beginning(self, prompt: Prompt, options: ChatOptions) -> TextPrompt | ChatPrompt:
        if not is_chat(prompt):
            check_plain(options)
            return TextPrompt.of(prompt, self.limits)
        source = chat_prompt(prompt, options, self.limits)
        if all(message["role"] in LEADING for message in source.messages):
            source.messages.append(dict(ANY_USER))  # many templates want one
        return source

    async def _warm(self, request: GenerationRequest) -> Usage:
        """Put a prompt into the prompt cache."""
        if not self.stats().prompt_cache.limit:
            raise InvalidRequest(
                "prompt_cache_bytes",
                "this engine keeps no prompts: there is nothing to warm; make it with more than 0",
            )
        work = self.submit(request)
        return (await logged(work.request_id, work.run(None))).usage

    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> list[GenerationResult | MLXEngineError]:
        running_loop()
        check_known(options, ChatRequestOptions)
        given: dict[str, Any] = {**ANSWER_DEFAULTS, **options}
        on_progress = checked_callback(given.pop("on_progress"))
        checked_priority(given["priority"], self.takes_priority)
        checked_time_limit(given["timeout"])
        max_wait = checked_wait(given.pop("max_wait"))
        self.check_strategies(given["prefill"], given["decode"])
        own = params_for_each(prompts, params)
        self.check_running()
        sampling = those_of(SamplingOptions, given)
        rest = {name: value for name, value in given.items() if name not in sampling}
        output = None if given["output"] is None else OutputType.of(given["output"])
        rest["output"] = output
        each = await made_once(own, lambda one: self._sampling(output, one, sampling))

        async def ask(item: tuple[Prompt, SamplingParams], left: float | None) -> GenerationResult:
            return await asked(self, *item, {**rest, "max_wait": left})

        items = dict(enumerate(zip(prompts, each, strict=True)))
        many = mapped(
            items, ask, self, concurrency=None, max_wait=max_wait, on_progress=on_progress
        )
        return await in_order(many, len(items))

    async def restart(self) -> None:
        running_loop()
        await self._clear_failure()
        await self.start()

    async def _clear_failure(self) -> None:
        """Stop the engine, if it has failed, so that it can be started; see ``restart``."""
        if self.state is EngineState.FAILED:
            await self.stop()

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
