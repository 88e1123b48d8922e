"""The answers to a request: from the engine's streams to whoever writes them down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from mlx_engine.engine.interface import Engine
from mlx_engine.errors import ContextLengthExceeded
from mlx_engine.outputs import GenerationChunk, GenerationResult, Progress, TokenLogprob
from mlx_engine.params import SamplingParams
from mlx_engine.server.asked import Asked
from mlx_engine.server.turns import Asker, Turns

Take = Callable[[int, GenerationChunk], Awaitable[None]]

_WITHOUT_CONTEXT = 32_768  # tokens of an answer, where nobody says how many there may be


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer.

    Attributes:
        result: the engine's.
        reasoning_tokens: of its tokens, those of its reasoning.
        logprobs: of the tokens of its content, if they were asked for.
    """

    result: GenerationResult
    reasoning_tokens: int
    logprobs: tuple[TokenLogprob, ...]


class Answering:
    """A request at work: one stream of the engine for each of its answers.

    Args:
        asked: what is wanted.
        defaults: for options that it has not.
        turns: of the engine, each of which is an answer.
        asker: who asks.
        take: awaited with each chunk, and the number of the answer that it is of. It may take its
            time: the engine does not wait for it.
        counts: whether ``prompt_tokens`` is to be known before the first chunk, for which an
            engine elsewhere has to send one message more.

    Attributes:
        prompt_tokens: of the first answer's prompt, once that is known.
        cached_tokens: of them, those that the prompt cache had.
    """

    def __init__(
        self,
        asked: Asked,
        defaults: SamplingParams,
        turns: Turns,
        asker: Asker,
        take: Take | None = None,
        *,
        counts: bool = False,
    ) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._asked = asked
        self._defaults = defaults
        self._turns = turns
        self._asker = asker
        self._take = take
        self._counts = counts

    async def run(self, engine: Engine) -> list[Answer]:
        """All answers of an engine, in order.

        Cancellation: raised once all of its work has left MLX.

        Raises:
            MLXEngineError: one of them has failed; the others are ended.
        """
        if self._asked.choices == 1:
            return [await self._answer(engine, 0)]
        found: dict[int, Answer] = {}
        errors: list[Exception] = []
        begun = asyncio.Event()  # so that the others find what the first has prefilled

        async def one(index: int) -> None:
            try:
                if index % self._asked.n:
                    await begun.wait()
                found[index] = await self._answer(engine, index, begun)
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for index in range(self._asked.choices):
                group.start_soon(one, index)
        if errors:
            raise errors[0]
        return [found[index] for index in range(self._asked.choices)]

    async def _answer(
        self, engine: Engine, index: int, begun: asyncio.Event | None = None
    ) -> Answer:
        options = dict(self._asked.options)
        limit = options.get("max_tokens", self._defaults.max_tokens)
        context = engine.context_length
        if limit is None and context is None:
            options["max_tokens"] = _WITHOUT_CONTEXT
        elif isinstance(limit, int) and context is not None and limit >= context:
            options["max_tokens"] = None
        if isinstance(seed := options.get("seed"), int):
            options["seed"] = (seed + index % self._asked.n) % 2**64 if seed >= 0 else seed
        async with self._turns.turn(self._asker, engine):
            try:
                return await self._read(engine, index, options, begun)
            except ContextLengthExceeded as error:
                tokens = error.prompt_tokens
                if not error.max_tokens or tokens is None or tokens >= error.context_length:
                    raise
            # Agents ask for more than is left, and mean all of that.
            return await self._read(engine, index, {**options, "max_tokens": None}, begun)

    async def _read(
        self, engine: Engine, index: int, options: Mapping[str, Any], begun: asyncio.Event | None
    ) -> Answer:
        on_progress = self._progress if self._counts and index == 0 else None
        reasoning_tokens, logprobs = 0, list[TokenLogprob]()
        stream = self._asked.begin(engine, index, self._defaults, options, on_progress)
        async with stream:
            async for chunk in stream:
                if begun is not None:
                    begun.set()
                if chunk.segment == "reasoning":
                    reasoning_tokens += len(chunk.tokens)
                elif chunk.segment == "content":
                    logprobs += chunk.logprobs
                if self._take is not None:
                    await self._take(index, chunk)
        return Answer(stream.result, reasoning_tokens, tuple(logprobs))

    def _progress(self, progress: Progress) -> None:
        if progress.phase == "prefill" and not self.prompt_tokens:
            self.prompt_tokens, self.cached_tokens = progress.total or 0, progress.done
