"""A stream of chunks: the MLX thread pushes, the event loop reads."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Protocol

from mlx_engine.core.channel import Channel
from mlx_engine.core.drain import clean_up, is_destroyed, wait_shielded
from mlx_engine.core.log import logged
from mlx_engine.core.wakeup import running_loop
from mlx_engine.errors import InvalidRequest, StreamClosed, StreamConsumed, StreamUnfinished
from mlx_engine.other_attributes import AsyncOnly
from mlx_engine.outputs import (
    FinishReason,
    GenerationChunk,
    GenerationResult,
    Segment,
    TokenLogprob,
    ToolCallDelta,
)

Emit = Callable[[GenerationChunk], None]


class Producer(Protocol):
    """A request as its stream sees it: it makes the chunks."""

    request_id: str

    def run(self, emit: Emit | None) -> Awaitable[GenerationResult]:
        """Do the work, calling ``emit`` from any thread, and give the result.

        Args:
            emit: gets each chunk at once; ``None`` makes no chunks.
        """

    def cancel(self) -> None:
        """Ask the work to stop. From any thread; returns at once."""

    def partial_result(self) -> GenerationResult:
        """The result so far, once the work has been cancelled and is over."""


class PartialAnswer(Protocol):
    """A structured answer as far as it can be read; it never raises."""

    def add(self, text: str) -> None:
        """Take the next piece of its text."""

    @property
    def value(self) -> Any:
        """The value so far; ``None`` as long as nothing can be read."""


class _Outcome:
    """How the work behind a stream ended."""

    result: GenerationResult | None = None
    error: BaseException | None = None


class GenerationStream(AsyncOnly):
    """An answer as it is made: an async iterator of ``GenerationChunk``, to be read once.

        async with engine.stream_generate("Once upon a time") as stream:
            async for chunk in stream:
                print(chunk.text, end="")
        print(stream.result.usage)

    The request starts when the stream is entered or first read, never before. Leave it with
    ``async with`` or ``aclose()``: a stream that is dropped unclosed frees the engine too,
    but only once it is garbage, and with a ``ResourceWarning``. A reader that is slow, or
    reads nothing, does not hold the engine up: chunks wait for it.

    Cancellation: when a task is cancelled while it waits for a chunk, the request is
    cancelled with it; ``CancelledError`` is raised once the work has left MLX, within one
    token or one prefill chunk. One that reads what was made before hears of it within 64 chunks
    or 5 ms, and lets others of its event loop in as often. To wait for a chunk with a time limit
    and go on reading afterwards, put ``asyncio.shield`` around a task that reads.
    """

    _reading: ClassVar = (
        "a stream is not awaited: write 'async with engine.stream_chat(...) as stream', "
        "and 'async for chunk in stream' in it; or await generate() or chat() for the whole"
    )
    _parts: ClassVar = {"result": GenerationResult}
    _advice: ClassVar = dict.fromkeys(
        ("segments", "chunks", "events"),
        "read it with 'async for': each chunk has text, segment, content and reasoning",
    )

    def __init__(self, producer: Producer, partial: PartialAnswer | None = None) -> None:
        self._producer = producer
        self._partial = partial
        self._outcome = _Outcome()
        self._task: asyncio.Task[None] | None = None
        self._channel: Channel | None = None
        self._iterated = False
        self._closed = False

    @property
    def request_id(self) -> str:
        """The engine's name for the request."""
        return self._producer.request_id

    @property
    def result(self) -> GenerationResult:
        """The whole answer, once the stream has been read to its end, or closed.

        Raises:
            StreamUnfinished: the answer is still being made.
            StreamClosed: the stream was closed before the request began.
            MLXEngineError: the error with which the request failed.
        """
        if self._outcome.error is not None:
            raise self._outcome.error.with_traceback(None)  # or it would grow each time
        if self._outcome.result is not None:
            return self._outcome.result
        if self._closed and self._task is None:
            raise StreamClosed("the stream was closed before it was started: there is no result")
        raise StreamUnfinished(
            "the answer is still being made: read the stream to its end first, which "
            "'await stream.collect()' does as well, or close it"
        )

    @property
    def partial(self) -> Any:
        """A structured answer as far as the chunks that were read tell it, as plain data: for a
        UI that fills in. ``None`` as long as there is nothing.

        Texts grow; what may still change, such as a number that goes on, is not there yet. Each
        is a value of its own, but what is complete in one is the same object in the next: do not
        change it. ``result.parsed`` is the whole.

        Raises:
            InvalidRequest: the answer is not bound to be JSON.
        """
        if self._partial is None:
            raise InvalidRequest(
                "output",
                "stream.partial is of answers that are JSON: ask for one with output=..., or with "
                "constraint=JSONSchema(...) or AnyJSON()",
            )
        return self._partial.value

    def cancel(self) -> None:
        """Ask the request to stop, from any thread; returns at once.

        The reader gets the chunks that were made, the last of them with the finish reason
        ``cancelled``. ``aclose()`` waits until the work has left MLX.
        """
        self._producer.cancel()
        task = self._task
        if task is not None and not task.done():
            try:
                task.get_loop().call_soon_threadsafe(task.cancel)
            except RuntimeError:
                pass  # the loop is closed

    async def aclose(self) -> None:
        """End the request, and wait until its work has left MLX. Any number of times.

        Cancellation does not cut the wait short; ``CancelledError`` is raised after it.
        """
        self._closed = True
        if self._task is None:
            return
        assert self._channel is not None
        if not self._task.done():
            self.cancel()
            if self._task.get_loop() is running_loop():
                await wait_shielded(self._task)
            elif not self._task.get_loop().is_closed():
                raise RuntimeError(
                    "a stream is closed in the event loop in which it was started; it has been "
                    "cancelled, which works from everywhere"
                )
        self._channel.chunks.clear()

    async def __aenter__(self) -> GenerationStream:
        self._start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        home = None if self._task is None else self._task.get_loop()
        if is_destroyed(exc, home):
            self._closed = True
            self.cancel()
        await clean_up(exc, self.aclose, home)

    def text(self) -> AsyncIterator[str]:
        """An iterator of what is for whoever reads the answer: no reasoning, no calls.

            async for text in stream.text():
                print(text, end="")

        It reads this stream: once, with the errors and the cancellation of the stream itself,
        which has all the rest in its ``result`` afterwards.
        """
        return _Texts(self)

    async def collect(self) -> GenerationResult:
        """Read what is left of the stream, and give the whole answer, as ``result`` does then.

            result = await engine.stream_chat(messages).collect()

        Cancellation and errors are those of reading it. What was collected once, or closed, is
        given again.
        """
        async with self:
            self._iterated = True
            while not self._closed:
                try:
                    await anext(self)
                except StopAsyncIteration:
                    break
        return self.result

    def __aiter__(self) -> GenerationStream:
        if self._iterated:
            raise StreamConsumed("a stream can be read once; ask the engine for a new one")
        self._iterated = True
        return self

    async def __anext__(self) -> GenerationChunk:
        """The next chunk.

        Raises:
            StopAsyncIteration: the answer is complete.
            StreamClosed: the stream has been closed.
            MLXEngineError: the request failed, or the engine was stopped.
        """
        if self._closed:
            raise StreamClosed("the stream has been closed and cannot be read any further")
        channel = self._channel or self._start()
        try:
            if channel.chunks:
                if channel.is_others_turn():
                    await asyncio.sleep(0)
                if channel.chunks:
                    return self._read(channel.chunks.popleft())
            chunk = await channel.get()
        except asyncio.CancelledError as cancelled:
            await clean_up(cancelled, self.aclose)
            raise
        if chunk is not None:
            return self._read(chunk)
        if self._outcome.error is not None:
            raise self._outcome.error.with_traceback(None)
        raise StopAsyncIteration

    def _read(self, chunk: GenerationChunk) -> GenerationChunk:
        if self._partial is not None:
            self._partial.add(chunk.content)
        return chunk

    def _start(self) -> Channel:
        if self._channel is not None:
            return self._channel
        if self._closed:
            raise StreamClosed("the stream has been closed and cannot be started any more")
        loop = running_loop()
        channel = self._channel = Channel(loop)
        # The task knows the channel, not the stream: a dropped stream must become garbage. What
        # the task waits for is held by whoever does it, and holds the task.
        self._task = loop.create_task(
            _produce(self._producer, channel, self._outcome), name=f"{self.request_id} stream"
        )
        ended = functools.partial(_ended, self._producer, channel, self._outcome)
        self._task.add_done_callback(ended)
        return channel

    def __del__(self) -> None:
        task = getattr(self, "_task", None)
        if task is None or task.done() or self._closed:
            return
        self.cancel()
        warnings.warn(
            f"{self.request_id}: a stream was dropped before it was read to its end or closed; "
            "use 'async with' around it",
            ResourceWarning,
            source=self,
            stacklevel=2,
        )


class _Texts:
    """Content of a stream."""

    def __init__(self, stream: GenerationStream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[str]:
        aiter(self._stream)
        return self

    async def __anext__(self) -> str:
        while not (content := (await anext(self._stream)).content):
            pass
        return content

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _produce(producer: Producer, channel: Channel, outcome: _Outcome) -> None:
    """The task behind a stream. It keeps errors for the reader and never raises."""
    try:
        outcome.result = await logged(producer.request_id, producer.run(channel.push))
        cancelled = outcome.result.finish_reason == "cancelled"
    except asyncio.CancelledError:
        outcome.result = producer.partial_result()
        cancelled = True
    except BaseException as error:  # noqa: BLE001 - the border: the reader raises it
        outcome.error = error
        return
    if cancelled and not channel.pushed:
        channel.push(GenerationChunk(text="", finish_reason="cancelled"))


def _ended(
    producer: Producer, channel: Channel, outcome: _Outcome, task: asyncio.Task[None]
) -> None:
    """The task is over, perhaps without ever having begun."""
    if outcome.result is None and outcome.error is None:
        outcome.result = producer.partial_result()
    channel.end()


class Piece(NamedTuple):
    """A part of an answer, as its text is taken apart.

    Attributes:
        segment: to which it belongs.
        text: the model's own.
        call: what it adds to a tool call.
    """

    segment: Segment
    text: str
    call: ToolCallDelta | None = None


def emit_pieces(
    emit: Emit,
    pieces: Sequence[Piece],
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...] = (),
    finish_reason: FinishReason | None = None,
) -> None:
    """Emit one chunk for each piece, at least one; the token goes with the first."""
    last = max(0, len(pieces) - 1)
    for index, (segment, text, call) in enumerate(pieces or (Piece("content", ""),)):
        reason = finish_reason if index == last else None
        emit(GenerationChunk(text, tokens, segment, logprobs, reason, call))
        tokens, logprobs = (), ()
