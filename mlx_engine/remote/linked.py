"""An engine elsewhere, with the interface of one that is here."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.checks import shown
from mlx_engine.core.bridge import checked_callback
from mlx_engine.core.in_flight import InFlight
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.base import BaseEngine
from mlx_engine.errors import InvalidRequest
from mlx_engine.outputs import (
    EngineState,
    EngineStats,
    ProgressCallback,
    ShutdownReport,
)
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.remote.client import Client
from mlx_engine.remote.exits import Exit
from mlx_engine.remote.health import Health, health_of
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.links.link import Link
from mlx_engine.remote.liveness import Liveness
from mlx_engine.remote.part import Part
from mlx_engine.remote.remote_request import RemoteRequest
from mlx_engine.remote.totals import bygone
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.remote.wire.messages import CacheFile, encode_strictly
from mlx_engine.remote.wire.values import question_to_wire
from mlx_engine.requests import GenerationRequest, checked_priority

T = TypeVar("T")


class LinkedEngine(BaseEngine):
    """An engine elsewhere: requests go over a link, and what serves them is watched.

    Attributes:
        name: for logs, and among the arguments of its process.
        frame_limit: bytes that a request may take.
    """

    frame_limit: ClassVar[int] = MAX_FRAME

    def __init__(
        self, name: str, watchdog: Watchdog | None, on_progress: ProgressCallback | None
    ) -> None:
        if watchdog is not None and not isinstance(watchdog, Watchdog):
            raise InvalidRequest(
                "watchdog", f"must be Watchdog(...) or None, not {shown(watchdog)}"
            )
        if not isinstance(name, str) or not name.isprintable():
            raise InvalidRequest("name", f"must be a printable string, not {shown(name)}")
        self.name = name
        self._watchdog = watchdog
        self._on_progress = checked_callback(on_progress)
        self._client = Client(name, watchdog, self.frame_limit)

    @property
    def pid(self) -> int | None:
        """Id of its process, as ``ps`` shows it; ``None`` while there is none on this machine that
        was started for it.
        """
        return None

    @abc.abstractmethod
    def _make_link(self) -> Callable[[], Link]:
        """A function that makes a link, in the I/O loop; it must not hold this engine."""

    @abc.abstractmethod
    def _greeting(self) -> Callable[[int | None], bytes]:
        """A function that makes the first frame, given the bytes that the engine may have.

        It must not hold this engine.
        """

    def _new_part(self) -> Part | None:
        """The part of this process's memory that the next life of the engine is to have."""
        return None

    @property
    def state(self) -> EngineState:
        return self._client.lifecycle.state

    @property
    def has_chat_template(self) -> bool:
        return self._client.welcome is not None and self._client.welcome.has_chat_template

    @property
    def model(self) -> str | None:
        return None if (welcome := self._client.welcome) is None else welcome.model

    @property
    def supports_tools(self) -> bool:
        return self._client.welcome is not None and self._client.welcome.supports_tools

    @property
    def supports_reasoning(self) -> bool:
        return self._client.welcome is not None and self._client.welcome.supports_reasoning

    @property
    def context_length(self) -> int | None:
        return None if (welcome := self._client.welcome) is None else welcome.context_length

    @property
    def last_exit(self) -> Exit | None:
        """The end of the process behind it, if it has ended. From any thread."""
        connection = self._client.connection
        return None if connection is None else connection.exit

    def stats(self) -> EngineStats:
        """The latest that the engine has told: after each request, and four times a second.

        Requests in work when it dies are added to those that have failed, or were cancelled.
        Counters begin at 0 when what runs the engine starts: with ``start``, or with the host.
        Cheap; from any thread.
        """
        connection = self._client.connection
        told = (connection.stats if connection else None) or _NOTHING_YET
        if connection is not None and connection.exit is not None:
            told = bygone(told)
        return replace(told, state=self.state)

    def check_health(self) -> Health:
        """Its health: whether a step is recent, if there is anything to do. From any thread."""
        connection, limits = self._client.connection, self._watchdog or Watchdog()
        alive = Liveness() if connection is None else connection.liveness
        return health_of(
            self.state, time.monotonic(), alive.last_beat, alive.heartbeat, limits, self.last_exit
        )

    async def start(self) -> None:
        """Start what runs the engine, which loads the model. No-op when the engine runs.

        Cancellation: what has been started is killed; nothing stays behind, and the engine can
        be started again.

        Raises:
            ModelLoadError, InvalidRequest: as raised by the engine itself.
            NotEnoughMemory: there is not enough of it beside the other engines of this process.
            EngineDead: what runs it has ended, or makes no progress; or a thread, a file or a
                process cannot be had for it, and it says what to do.
            EngineStopped: the engine is being shut down.
            EngineNotStarted: the start that another task had begun did not succeed.
            RuntimeError: this process was forked from one that uses engines elsewhere.
        """
        part = self._new_part()
        await self._client.start(self._make_link(), self._greeting(), self._on_progress, part)

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:
        """Refuse new requests from now on, let those in flight finish, end what runs the engine.

        Args:
            timeout: seconds that requests in flight may take; then they are aborted and
                their callers get ``EngineStopped``. ``None`` waits for all of them, 0 for
                none. What does not end by then is killed, so that this returns at most one
                second after the deadline, whatever the engine is stuck in.

        Returns:
            Which requests finished, and which were aborted.

        May be called any number of times, from several tasks: the earliest deadline counts.

        Cancellation: requests still in flight are aborted, the engine is ended, then
        ``CancelledError`` is raised.

        Raises:
            InvalidRequest: ``timeout`` is not such a number.
        """
        return await self._client.shutdown(timeout)

    async def _clear_failure(self) -> None:
        await self._client.clear_failure()

    async def wait_exit(self) -> Exit:
        """Wait until what runs the engine is gone, and tell how it ended.

        Raises:
            EngineNotStarted: it has never been started.
        """
        running_loop()
        connection = self._client.connection
        if connection is None or connection.link is None:
            self.check_running()
        assert connection is not None
        return await io_thread.run(connection.exited)

    def kill(self) -> None:
        """End what runs the engine now; requests get ``EngineDead``. From any thread."""
        if self._client.connection is not None:
            self._client.connection.kill()

    async def run_blocking(
        self,
        func: Callable[..., T],
        /,
        *args: Any,
        on_cancel: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> T:
        raise InvalidRequest(
            "func",
            "a function cannot go to the engine's process; use SimpleEngine or BatchedEngine to "
            "run MLX functions of your own",
        )

    def check_running(self) -> None:
        self._client.lifecycle.check_running()

    @property
    def width(self) -> int:
        return 1 if (welcome := self._client.welcome) is None else welcome.width

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> RemoteRequest:
        self.check_strategies(request.prefill, request.decode)
        checked_priority(request.priority, self.takes_priority)
        request_id = request_id or self._client.lifecycle.new_id()
        return RemoteRequest(self._client, request, on_progress, request_id)

    async def answer(self, question: PromptQuestion) -> PromptFacts:
        running_loop()
        self.check_running()
        client, number = self._client, self._client.new_number()
        entry = InFlight(client.lifecycle.new_id(question.subject))
        frame = question_to_wire(number, question, client.frame_limit)
        facts: PromptFacts = await client.ask(entry, number, frame).answer()
        return facts

    async def _save_prompt_cache(self, path: Path) -> int:
        return await self._cache_file("save", path)

    async def _load_prompt_cache(self, path: Path) -> int:
        return await self._cache_file("load", path)

    async def _cache_file(self, action: Literal["save", "load"], path: Path) -> int:
        self.check_running()
        client, number = self._client, self._client.new_number()
        try:
            frame = encode_strictly([CacheFile(number, action, self._file_there(path))])
        except (UnicodeEncodeError, OSError) as error:
            raise InvalidRequest("path", f"cannot go to another process: {error}") from error
        entry = InFlight(client.lifecycle.new_id(action))
        prompts: int = await client.ask(entry, number, frame).answer()
        return prompts

    def _file_there(self, path: Path) -> str:
        """The path of a file as it is called where the engine is."""
        return str(path.absolute())


_NOTHING_YET = EngineStats(
    EngineState.CREATED, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, PromptCacheStats()
)
