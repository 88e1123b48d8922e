"""The protocol of an engine: what its callers see."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack

from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.chat_interface import ChatEngine
from mlx_engine.engine.map_interface import MapEngine
from mlx_engine.outputs import (
    EngineState,
    EngineStats,
    GenerationResult,
    ShutdownReport,
)
from mlx_engine.params import SamplingParams
from mlx_engine.requests import ALL_DEFAULTS, RequestOptions
from mlx_engine.signatures import spelled_out

T = TypeVar("T")


class Engine(ChatEngine, MapEngine, Protocol):
    """A model behind ``await``, as its callers see it: all engines are that, and so is what an
    application puts around one, to log or to remember answers.

    Use it as ``async with engine:``, or call ``start()`` and ``stop()``.
    """

    @property
    @abc.abstractmethod
    def state(self) -> EngineState:
        """Where the engine is in its life. From any thread."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Requests that can be in work at once. From any thread."""

    @abc.abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot of counters. Cheap; from any thread."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Find, if need be download, and load the model. No-op when the engine runs.

        Cancellation: the load ends soon; nothing stays behind, and the engine can be started
        again.

        Raises:
            ModelLoadError: the model cannot be found or loaded; start may be tried again.
            InvalidRequest: an option does not suit the model.
            EngineStopped: the engine is being shut down.
            EngineNotStarted: the start that another task had begun did not succeed.
            EngineDead: the engine has failed: ``restart()`` it. Or there is no thread for it.
            RuntimeError: this process was forked from one that has used MLX.
        """

    @abc.abstractmethod
    async def restart(self) -> None:
        """Bring an engine back that has failed (``EngineDead``): let go of what is left of it, and
        start it again. No-op when the engine runs.

        It may be called by all who got that error at the same time: it is done once, and all wait
        for it. An engine that was never started is started. One that somebody has stopped stays
        so: ``start()`` it. To load the model of one that runs anew, ``stop()`` and ``start()``.

        The prompt cache is empty afterwards.

        Cancellation: as that of ``stop`` and of ``start``; it can be done again.

        Raises:
            EngineStopped: the engine is stopped, or is being stopped.
            ModelLoadError, InvalidRequest, EngineNotStarted, EngineDead, RuntimeError: as
                ``start`` does; it can be done again.
        """

    @abc.abstractmethod
    async def stop(self) -> ShutdownReport:
        """End everything in flight now and release the model: ``shutdown(0)``."""

    @abc.abstractmethod
    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Refuse new requests from now on, let those in flight finish, release the model.

        Args:
            timeout: seconds that requests in flight may take; then they are aborted and
                their callers get ``EngineStopped``. ``None`` waits for all of them, 0 for
                none. An engine that is still loading stops loading at once.

        Returns:
            Which requests finished, and which were aborted.

        May be called any number of times, from several tasks: the earliest deadline counts.
        The model is dropped on the MLX thread, when its turn comes: work of other engines
        that is there already is waited for.

        Cancellation: requests still in flight are aborted, the model is released, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
            RuntimeError: called from inside a job on the MLX thread.
        """

    @abc.abstractmethod
    async def __aenter__(self) -> Self: ...

    @abc.abstractmethod
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    @abc.abstractmethod
    @spelled_out(RequestOptions, ALL_DEFAULTS)
    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """Continue ``prompt``, and give the whole answer.

        Args:
            prompt: text, or token ids.
            params: sampling parameters.
            output: what the answer is to be, and ``result.parsed`` is: a class with fields (a
                pydantic model, a dataclass, a ``TypedDict``, a ``msgspec.Struct``), a
                ``TypeAdapter`` of pydantic's, or a JSON schema, of which ``parsed`` is plain
                data. It stands for ``constraint=JSONSchema(...)``, and puts nothing into the
                prompt. Objects of a class have its fields and no others.
            timeout: seconds of work, from the moment when its turn has come; then the answer ends
                as it is, with the finish reason ``timeout``, at the next token or prefill chunk.
                ``None`` is no limit. ``asyncio.timeout`` around the call is another thing: it
                counts the time in the queue too, and nothing is left of the answer.
            max_wait: seconds in the queue, after which ``EngineBusy`` is raised; 0 waits for
                nobody. Of this and the engine's own ``max_wait`` the smaller one counts.
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
            OutputInvalid: a validator of ``output`` refused the answer, which is in the error.
        """

    @abc.abstractmethod
    @spelled_out(RequestOptions, ALL_DEFAULTS)
    def stream_generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationStream:
        """Continue ``prompt`` as a stream; arguments and errors are those of ``generate``.

        The request starts when the stream is entered or first read. What is plainly wrong with
        the arguments is raised at once; all else, errors of state and queue included, when the
        stream is read.
        """

    @abc.abstractmethod
    async def save_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        """Write the prompt cache into a file, for an engine with the same model to load.

        Requests go on meanwhile: it takes short turns between their steps, and writes beside
        them. Whatever happens, ``path`` has either the old file or the new one, which only its
        owner can read.

        Returns:
            The number of prompts written: of those that were stored when it began all that were
            not evicted before their turn.

        Cancellation: it ends at once, between two pieces of the file; ``path`` has the old one.

        Raises:
            InvalidRequest: the file cannot be written.
            GenerationError: MLX failed meanwhile; the file is the old one.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
        """

    @abc.abstractmethod
    async def load_prompt_cache(self, path: str | os.PathLike[str]) -> int:
        """Add the prompts of a file that ``save_prompt_cache`` has written.

        Requests go on meanwhile, as they do while one is saved. The whole file is checked before
        anything is added. If there are more than the prompt cache may hold, those used last are
        kept.

        Returns:
            The number of prompts added.

        Cancellation: it ends at once, between two pieces of the file; prompts that were added
        by then stay.

        Raises:
            InvalidRequest: there is no such file, it is damaged (a checksum is wrong), or of
                another version, another model or other KV cache options; the prompt cache is as
                it was.
            GenerationError: MLX failed meanwhile.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
        """

    @abc.abstractmethod
    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Run a function of your own on the MLX thread, when its turn comes.

        It must be synchronous, and is free to use MLX. It sees the caller's context
        variables.

        Args:
            on_cancel: called once, from any thread, if the call is cancelled while the
                function runs; it should make the function return soon.

        Cancellation: waiting, the call leaves the queue at once. Once the function runs, the
        call stays until it has returned, however often it is cancelled; the outcome is
        discarded and ``CancelledError`` raised.

        Raises:
            RuntimeError: called from inside another job on the MLX thread.
            InvalidRequest: ``func`` is not a plain function, or the engine is in another
                process, where a function cannot go.
            EngineBusy, EngineNotStarted, EngineStopped, EngineDead: as in ``generate``.
            BaseException: whatever the function raises.
        """
