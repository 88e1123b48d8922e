"""The protocol of an engine, as far as it is about what its model reads and writes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Unpack

from mlx_engine.core.stream import GenerationStream
from mlx_engine.outputs import GenerationResult, RenderedChat, Usage
from mlx_engine.params import SamplingParams
from mlx_engine.requests import (
    ALL_DEFAULTS,
    ChatOptions,
    ChatRequestOptions,
    Message,
    Prompt,
)
from mlx_engine.signatures import spelled_out


class ChatEngine(Protocol):
    """The half of ``Engine`` that chats, and tells what prompts come to."""

    @property
    @abc.abstractmethod
    def model(self) -> str | None:
        """Name of the model: what the engine was made with. From any thread. ``None`` where only
        the other side knows it, and there is no connection: in ``RemoteEngine``.
        """

    @property
    @abc.abstractmethod
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used. ``False`` while no model is loaded. From any thread."""

    @property
    @abc.abstractmethod
    def supports_tools(self) -> bool:
        """Whether chats may have ``tools``: the chat template shows them to the model, and it, or
        ``tool_format``, says how calls are written. ``False`` while no model is loaded. From any
        thread.
        """

    @property
    @abc.abstractmethod
    def supports_reasoning(self) -> bool:
        """Whether the model marks what it thinks aloud, so that it is told from the answer.
        ``False`` while no model is loaded. From any thread.
        """

    @property
    @abc.abstractmethod
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None`` if there is no limit, or
        no model is loaded. From any thread.
        """

    @abc.abstractmethod
    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    async def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> GenerationResult:
        """Answer a conversation in the model's chat template.

        Args:
            messages: mappings with ``role`` and ``content``, as in OpenAI's API; see ``Message``.
                An earlier result stands for its ``message()``.
            params: sampling parameters.
            output: as in ``generate``; such an answer has no calls.
            tools: descriptions of the tools that the model may call, as in OpenAI's API.
            tool_choice: ``"none"`` does not show the tools to the model, ``"required"`` lets it
                answer with calls alone, and ``{"type": "function", "function": {"name": ...}}``
                with one of this tool.
            parallel_tool_calls: ``False`` takes the first call of an answer alone; others have an
                ``error``.
            thinking: whether the model should think aloud first; ``None`` is what its chat
                template does by itself.
            max_reasoning_tokens: tokens after which its reasoning is closed, and the answer goes
                on; ``None`` is no limit of its own.
            continue_final_message: whether the answer goes on with the last message, which is
                the assistant's, rather than replying to it.
            chat_template_kwargs: variables for the template, e.g. ``{"documents": [...]}``.
            timeout: seconds of work, as in ``generate``: then the answer ends as it is.
            max_wait: seconds in the queue, as in ``generate``.
            priority: lower goes first; 0 is all that ``SimpleEngine`` takes.
            prefill: ``None`` prefills all of this prompt; ``SpecPrefill(...)`` changes what
                an engine keeps that has been made with one.
            decode: ``None`` decodes this answer one token after another.
            on_progress: told of the prefill, in this event loop.
            options: fields of ``SamplingParams``; they go before ``params``.

        Cancellation and errors are those of ``generate``; a model without a chat template,
        or a template without tools, is an ``InvalidRequest``.
        """

    @abc.abstractmethod
    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    def stream_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> GenerationStream:
        """Answer a conversation as a stream; arguments and errors are those of ``chat``."""

    @abc.abstractmethod
    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def count_tokens(
        self,
        prompt: str | Sequence[int] | Sequence[Message | Mapping[str, Any] | GenerationResult],
        **options: Unpack[ChatOptions],
    ) -> int:
        """Count the tokens that a prompt would have: ``usage.prompt_tokens`` of its answer.

        It waits for no turn, in whatever the engine is at work: the prompt is made into tokens
        on a helper thread, as those of requests are. One such question is answered at a time;
        ``queue_limit`` and ``max_wait`` are for those that wait too, apart from requests: as
        many may wait, for as long.

        Args:
            prompt: text, token ids, or the messages of a chat; the rest as in ``chat``, also what
                has no part in the prompt.

        Cancellation: what waits for a thread leaves at once. What is being done stops between
        two steps, rendering and tokenizing; ``CancelledError`` is raised then.

        Raises:
            InvalidRequest: the prompt is not acceptable.
            ContextLengthExceeded: it is more than four times as long as the model's context.
            GenerationError: the tokenizer failed.
            EngineBusy: too many questions wait already, or this one has waited too long; or an
                engine elsewhere, or whoever hosts it, has too much under way.
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state.
        """

    @abc.abstractmethod
    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def render_chat(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        **options: Unpack[ChatOptions],
    ) -> RenderedChat:
        """Put a conversation into the model's chat template, and show what comes out: the
        prompt's text and tokens, and how many of them the prompt cache has now.

        Arguments are those of ``chat``; turn, cancellation and errors those of ``count_tokens``.
        The prompt cache is only looked at; of several replicas, it is that of one.
        """

    @abc.abstractmethod
    @spelled_out(ChatOptions, ALL_DEFAULTS)
    async def warm(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> Usage:
        """Prefill a prompt into the prompt cache, so that those that begin like it need not.

            await engine.warm([{"role": "system", "content": RULES}], tools=TOOLS)

        It is a request without an answer (``max_tokens=0``), and takes its turn as one. Messages
        without one of the user's are the beginning of conversations: all that begin with the same
        system message and tools find it. What is kept is dropped like other stored prompts, when
        it was used least recently. An ``EngineManager`` has it done by all replicas that are up.

        Args:
            prompt: text, token ids, or the messages of a chat; the rest as in ``chat``.

        Returns:
            Tokens of the prompt, and how many of them the prompt cache had before.

        Cancellation and errors are those of ``chat``; ``InvalidRequest`` too if the engine keeps
        no prompts.
        """

    @abc.abstractmethod
    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, as ``generate`` makes them: with the special tokens that this
        tokenizer puts in front, unless the text has them.

        Turn, cancellation and errors are those of ``count_tokens``.
        """

    @abc.abstractmethod
    async def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens included, as in ``result.text``.

        Turn, cancellation and errors are those of ``count_tokens``.
        """
