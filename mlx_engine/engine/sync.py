"""Engines without ``await``: for scripts, and whatever else has no event loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.interface import Engine
from mlx_engine.engine.sync_front import BlockingIterator, E_co, without_await
from mlx_engine.engine.sync_map import MapFront
from mlx_engine.other_attributes import WithAdvice
from mlx_engine.outputs import EngineState, EngineStats, GenerationChunk, GenerationResult

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[Engine, P], Awaitable[T]],
) -> Callable[Concatenate[SyncEngine[Engine], P], T]:
    """A method of ``SyncEngine`` that awaits this one of its engine."""

    @functools.wraps(method)
    def call(front: SyncEngine[Engine], /, *args: P.args, **kwargs: P.kwargs) -> T:
        own: Callable[P, Awaitable[T]] = getattr(front.engine, method.__name__)
        return front.run(own, *args, **kwargs)

    call.__doc__ = without_await(method.__doc__)
    return call


def _streaming(
    method: Callable[Concatenate[Engine, P], GenerationStream],
) -> Callable[Concatenate[SyncEngine[Engine], P], SyncStream]:
    """A method of ``SyncEngine`` with the stream that this one of its engine gives."""

    @functools.wraps(method)
    def make(front: SyncEngine[Engine], /, *args: P.args, **kwargs: P.kwargs) -> SyncStream:
        own: Callable[P, GenerationStream] = getattr(front.engine, method.__name__)
        return SyncStream(own(*args, **kwargs), front)

    shown = inspect.signature(method).replace(return_annotation="SyncStream")
    make.__signature__ = shown  # type: ignore[attr-defined]
    return make


class SyncEngine(MapFront[E_co]):
    """An engine whose methods block, rather than being awaited: what ``engine.sync()`` gives.

        with SimpleEngine("demo").sync() as llm:
            print(llm.generate("The capital of France is", max_tokens=8).text)
            with llm.stream_chat([{"role": "user", "content": "Hi"}]) as stream:
                for text in stream.text():
                    print(text, end="", flush=True)

    Arguments, results and errors are those of the engine's own methods; streams are iterators and
    context managers (``SyncStream``). What it awaits runs in an event loop of its own, on a thread
    that is there while the engine runs; callbacks such as ``on_progress`` are called there. It may
    be used from several threads at once: each call blocks its own thread alone.

    Cancellation: Ctrl-C in the main thread, or whatever else a signal handler raises there, cancels
    the call, as ``Task.cancel`` does; ``KeyboardInterrupt`` is raised when its work has left MLX,
    however often Ctrl-C is pressed. ``cancel()`` does that to the calls of other threads, which
    get ``concurrent.futures.CancelledError``. The end of ``with`` stops the engine, and whatever
    is under way in it.

    In a thread that runs an event loop, calls raise ``RuntimeError``: they would hold it up. There
    the engine itself is what to use; or ``await asyncio.to_thread(llm.generate, ...)``.

    Attributes:
        engine: what it is made of; its ``stats()`` and whatever else is not awaited can be used
            from any thread.
    """

    def __enter__(self) -> Self:
        """Start the engine."""
        started = False

        async def start() -> None:
            nonlocal started
            await self.engine.__aenter__()
            started = True

        try:
            self.run(start)
        except BaseException:
            if started:  # Ctrl-C came too late to stop it
                self.run(self.engine.stop)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the engine."""
        self.run(self.engine.__aexit__, exc_type, exc, traceback)

    start = _blocking(Engine.start)
    stop = _blocking(Engine.stop)
    shutdown = _blocking(Engine.shutdown)
    restart = _blocking(Engine.restart)
    warm = _blocking(Engine.warm)
    generate = _blocking(Engine.generate)
    generate_batch = _blocking(Engine.generate_batch)
    stream_generate = _streaming(Engine.stream_generate)
    chat = _blocking(Engine.chat)
    stream_chat = _streaming(Engine.stream_chat)
    count_tokens = _blocking(Engine.count_tokens)
    render_chat = _blocking(Engine.render_chat)
    encode = _blocking(Engine.encode)
    decode = _blocking(Engine.decode)
    save_prompt_cache = _blocking(Engine.save_prompt_cache)
    load_prompt_cache = _blocking(Engine.load_prompt_cache)
    run_blocking = _blocking(Engine.run_blocking)

    @property
    def state(self) -> EngineState:
        """See ``Engine``."""
        return self.engine.state

    @property
    def model(self) -> str | None:
        """See ``Engine``."""
        return self.engine.model

    @property
    def has_chat_template(self) -> bool:
        """See ``Engine``."""
        return self.engine.has_chat_template

    @property
    def supports_tools(self) -> bool:
        """See ``Engine``."""
        return self.engine.supports_tools

    @property
    def supports_reasoning(self) -> bool:
        """See ``Engine``."""
        return self.engine.supports_reasoning

    @property
    def context_length(self) -> int | None:
        """See ``Engine``."""
        return self.engine.context_length

    @property
    def width(self) -> int:
        """See ``Engine``."""
        return self.engine.width

    def stats(self) -> EngineStats:
        """See ``Engine``."""
        return self.engine.stats()


class SyncStream(WithAdvice):
    """A ``GenerationStream`` without ``await``: an iterator of chunks, to be read once.

        with llm.stream_generate("Once upon a time") as stream:
            for chunk in stream:
                print(chunk.text, end="")
        print(stream.result.usage)

    Cancellation: Ctrl-C while it is read cancels the request; ``KeyboardInterrupt`` is raised once
    the work has left MLX. Between two reads it is raised at once, as anywhere in a script, and the
    end of ``with`` cancels the request. All else is as in ``GenerationStream``.
    """

    _parts: ClassVar = {"result": GenerationResult}

    def __init__(self, stream: GenerationStream, front: SyncEngine[Engine]) -> None:
        self._stream = stream
        self._front = front

    @property
    def request_id(self) -> str:
        """The engine's name for the request."""
        return self._stream.request_id

    @property
    def result(self) -> GenerationResult:
        """The whole answer, once the stream is over. See ``GenerationStream``."""
        return self._stream.result

    @property
    def partial(self) -> Any:
        """A structured answer so far. See ``GenerationStream``."""
        return self._stream.partial

    def cancel(self) -> None:
        """Ask the request to stop, from any thread; returns at once. See ``GenerationStream``."""
        self._stream.cancel()

    def close(self) -> None:
        """End the request, and wait until its work has left MLX. Any number of times."""
        self._front.run(self._stream.aclose)

    def collect(self) -> GenerationResult:
        """Read what is left of it, and give the whole answer. See ``GenerationStream``."""
        return self._front.run(self._stream.collect)

    def text(self) -> Iterator[str]:
        """An iterator of what is for whoever reads the answer. See ``GenerationStream``."""
        return BlockingIterator(aiter(self._stream.text()), self._front)

    def __iter__(self) -> Iterator[GenerationChunk]:
        return BlockingIterator(aiter(self._stream), self._front)

    def __next__(self) -> GenerationChunk:
        return next(BlockingIterator(self._stream, self._front))

    def __enter__(self) -> Self:
        self._front.run(self._stream.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._front.run(self._stream.__aexit__, exc_type, exc, traceback)
