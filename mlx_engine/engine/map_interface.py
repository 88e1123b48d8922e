"""The protocol of an engine, as far as it is about many requests by one call."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, Unpack, overload

from mlx_engine.checks import checked_time_limit, checked_wait
from mlx_engine.core.bridge import checked_callback
from mlx_engine.engine.many import mapped
from mlx_engine.engine.outcomes import Outcomes
from mlx_engine.engine.typed import OutputType
from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import GenerationResult
from mlx_engine.params import SamplingOptions, SamplingParams
from mlx_engine.questions import check_plain, is_chat
from mlx_engine.requests import (
    ALL_DEFAULTS,
    ChatOptions,
    ChatRequestOptions,
    Prompt,
    check_known,
    those_of,
)
from mlx_engine.signatures import spelled_out

K = TypeVar("K")


class MapEngine(Protocol):
    """The part of ``Engine`` that takes many prompts or conversations at once."""

    # A mapping iterates over its keys, too, and pairs look like token ids: the first one counts.
    @overload
    def map(  # type: ignore[overload-overlap]
        self,
        prompts: Mapping[K, Prompt],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> Outcomes[K]: ...

    @overload
    def map(  # type: ignore[overload-overlap]
        self,
        prompts: Iterable[tuple[K, Prompt]] | AsyncIterable[tuple[K, Prompt]],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> Outcomes[K]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> Outcomes[int]: ...

    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    def map(
        self,
        prompts: Any,
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> Outcomes[Any]:
        """Answer many prompts or conversations, and give the outcome of each as it comes.

            async with engine.map({"a": "Hi", "b": "Ho"}, timeout=60, retries=2) as outcomes:
                async for outcome in outcomes:
                    print(outcome.id, outcome.result or outcome.error)

        A failure costs its own item only, and is a value: ``outcome.error``. Each item is one
        call of this engine's ``chat`` or ``generate``, those of an application's own class too.

        Args:
            prompts: prompts (text or token ids) and conversations (lists of messages), of both
                kinds if need be: a list, an iterator or an async iterator, which may be endless.
                The id of each is its index; pairs ``(id, prompt)``, as of ``zip(ids, prompts)``,
                or a mapping of ids to prompts, give others. A text is completed as it stands: a
                question to a model that knows chats is a conversation.
            params: sampling parameters of all.
            concurrency: items under way at a time; ``None`` is as many as the engine can have in
                work at once and a few more, which wait for the next place.
            ordered: whether outcomes come in the order of the items; by default as they are
                completed.
            retries: attempts after the first one, for errors that are ``retryable``, but for
                ``EngineBusy``, which is waited out and is no attempt (``max_wait`` bounds that).
                An answer that its ``timeout`` has cut is no error. They come after 0.5 s, then
                1 s and so on up to 30 s, drawn by chance between half of that and all. An engine
                that is dead is restarted for that, as ``restart`` does.
            timeout: as in ``generate``, for each attempt.
            max_wait: seconds that each item may wait for its turn; then its outcome is
                ``EngineBusy``. ``None``: where there is no place, because of others' requests or
                the engine's own limits, it waits until there is one, without end; after 5 s
                that is in the log.
            on_progress: told in this event loop how many items are over.
            options: those of ``chat`` and ``generate``, for all; those of chats are for
                conversations only.

        Returns:
            An async iterator of ``Outcome``, and a context manager; nothing begins before it is
            entered or read.

        Cancellation: what is under way is cancelled, and ``CancelledError`` raised when it is out
        of MLX; what is done is kept. ``break`` and ``aclose()`` leave nothing running.

        Raises:
            InvalidRequest: an argument is not acceptable for any item; at once.
            EngineNotStarted, EngineStopped, EngineDead: while it is read, if the engine takes no
                requests any more, and items are left; what was under way has outcomes that say so.
        """
        check_known(options, ChatRequestOptions, ("concurrency", "ordered", "retries"))
        given: dict[str, Any] = dict(options)
        on_progress, max_wait = given.pop("on_progress", None), given.pop("max_wait", None)
        sampling = those_of(SamplingOptions, given)
        made = SamplingParams.of(params, **sampling)
        for name in sampling:
            del given[name]
        checked_time_limit(given.get("timeout"))
        if given.get("output") is not None:
            given["output"] = OutputType.of(given["output"])

        async def ask(item: Any, left: float | None) -> GenerationResult:
            return await asked(self, item, made, {**given, "max_wait": left})

        return mapped(
            prompts,
            ask,
            self,
            concurrency=concurrency,
            ordered=ordered,
            retries=retries,
            max_wait=checked_wait(max_wait),
            on_progress=checked_callback(on_progress),
        )

    @abc.abstractmethod
    @spelled_out(ChatRequestOptions, ALL_DEFAULTS)
    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        **options: Unpack[ChatRequestOptions],
    ) -> list[GenerationResult | MLXEngineError]:
        """Answer many prompts or conversations, as many at once as the engine can: ``map``, with
        all answers at the end.

        Args:
            prompts: texts, lists of token ids, or lists of messages.
            params: sampling parameters of all, or a list with those of each.
            on_progress: told in this event loop how many requests are over.
            options: those of ``chat`` and ``generate``, for all; ``max_wait`` is as in ``map``.

        Returns:
            For each prompt, in order, its result, or the error with which it failed: one that
            fails costs no other its result.

        In the queue are, at any time, as many requests as can be in work at once and a few
        more, which wait for the next place. Where there is no place, because of others' requests
        or the engine's ``queue_limit`` or ``max_wait``, they wait until there is one.

        Cancellation: all requests are cancelled; ``CancelledError`` is raised when they are
        out of MLX. Use ``map`` to keep the answers that there are by then.

        Raises:
            InvalidRequest: an argument is not acceptable for any prompt.
            EngineNotStarted, EngineStopped, EngineDead: by the engine's state, at the call.
        """


async def asked(
    engine: Any, item: Any, params: SamplingParams, options: dict[str, Any]
) -> GenerationResult:
    """The answer to a prompt or a conversation.

    Raises:
        MLXEngineError: as ``chat`` and ``generate`` do; also if a plain prompt comes with options
            of chats.
    """
    if is_chat(item):
        return await engine.chat(item, params, **options)  # type: ignore[no-any-return]
    of_chats = those_of(ChatOptions, options)
    check_plain(of_chats)  # type: ignore[arg-type]
    plain = {name: value for name, value in options.items() if name not in of_chats}
    return await engine.generate(item, params, **plain)  # type: ignore[no-any-return]
