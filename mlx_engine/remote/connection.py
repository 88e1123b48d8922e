"""The connection to an engine elsewhere: one life of it, from start to end. In the I/O loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_engine.core.wakeup import waking_together
from mlx_engine.errors import EngineDead, MLXEngineError
from mlx_engine.outputs import EngineStats, Progress, ProgressCallback
from mlx_engine.remote.calls import Calls
from mlx_engine.remote.exits import Exit, ExitKind
from mlx_engine.remote.io_thread import io_thread
from mlx_engine.remote.links.link import Ending, Link
from mlx_engine.remote.liveness import Liveness
from mlx_engine.remote.part import Part
from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.heartbeat import Watchdog
from mlx_engine.remote.wire.messages import (
    BudgetTaken,
    CacheFileDone,
    Chunk,
    Done,
    Draining,
    ErrorReply,
    Facts,
    Heartbeat,
    ProgressUpdate,
    Refused,
    Shutdown,
    Stopped,
    ToClient,
    Welcome,
    decode_from_server,
    encode,
)
from mlx_engine.remote.wire.values import error_from_wire

_TERMINATE_AFTER = 0.35  # seconds from the deadline of a shutdown
_KILL_AFTER = 0.65
_FAILED = "its engine has failed"

_log = logging.getLogger("mlx_engine.remote")


class Connection:
    """A link, what is asked over it, and the watchdog.

    Args:
        name: of the engine, for the log.
        make_link: called in the I/O loop.
        greeting: makes the payload of the first frame, with the bytes that the engine may have.
        watchdog: ``None`` watches nothing.
        on_progress: told of the start, on the I/O thread.
        on_draining: called when the other end drains because somebody else has asked it to.
        on_exit: called once, when the other end is gone.
        part: what the other end has of this process's memory.

    Attributes:
        calls: what has been asked.
        link: to the other end, once it was opened.
        welcome: what the engine has said of itself when it was ready.
        stats: the latest that it has told, and what its end was for requests.
        liveness: its heartbeats.
        exit: how it ended, once it has.
    """

    def __init__(
        self,
        name: str,
        make_link: Callable[[], Link],
        greeting: Callable[[int | None], bytes],
        watchdog: Watchdog | None,
        on_progress: ProgressCallback | None,
        on_draining: Callable[[Connection], None],
        on_exit: Callable[[Exit], None],
        part: Part | None = None,
    ) -> None:
        self.calls = Calls(self._send_soon)
        self.welcome: Welcome | None = None
        self.stats: EngineStats | None = None
        self.liveness = Liveness()
        self.exit: Exit | None = None
        self.link: Link | None = None
        self._part = part
        self._name = name
        self._make_link = make_link
        self._greeting = greeting
        self._limits = watchdog
        self._on_progress = on_progress
        self._on_draining = on_draining
        self._on_exit = on_exit
        self._ready: asyncio.Future[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._unwanted = False  # before it was opened
        self._ending = False  # it was asked to end, by us
        self._deadline: float | None = None  # by time.monotonic
        self._stopped = False
        self._verdict: str | None = None  # of the watchdog
        self._refusal: str | None = None  # of the other end
        self._start_error: MLXEngineError | None = None
        io_thread.call_at_exit(self._interpreter_exits)

    # From any thread

    def _send_soon(self, frame: bytes) -> None:
        io_thread.call(self._send, frame)

    def end_by(self, deadline: float | None) -> None:
        """Have the engine drain until then (by ``time.monotonic``), abort the rest, and end.

        It is killed if it does not. The earliest deadline counts. From any thread.
        """
        io_thread.call(self._end_by, deadline)

    def kill(self) -> None:
        """Kill what is at the other end. From any thread."""
        io_thread.call(self._kill)

    # In the I/O loop

    async def open(self) -> None:
        """Start what is at the other end, and wait until its engine is ready.

        Cancellation: it is killed; ``CancelledError`` is raised when it is gone.

        Raises:
            MLXEngineError: the engine could not be started, or its process has ended.
        """
        if self._unwanted:
            raise EngineDead("the engine was stopped before its process was started")
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        link = self.link = self._make_link()
        link.on_frame = self._receive
        link.gone.add_done_callback(self._gone)
        self.liveness.seen()
        if self._limits is not None:
            self._watch = loop.create_task(self._watch_over(link, self._limits))
        opening = loop.create_task(link.open())
        try:
            await _first(opening, link.gone)
            if opening.done():
                opening.result()
                if self._part is not None:
                    await self._part.place(link)
                memory = None if self._part is None else self._part.begin(self._send_soon)
                link.send(self._greeting(memory))
                await _first(self._ready, link.gone)
            if self._start_error is not None:
                raise self._start_error
            if not self._ready.done():
                await asyncio.wait({link.gone})
                assert self.exit is not None
                raise self.exit.error()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                self._ending = True
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled():
                opening.exception()
            await self.closed(0.0)
            raise

    async def closed(self, patience: float | None = None) -> None:
        """Wait until the other end is gone.

        Args:
            patience: seconds after which it is killed.
        """
        if self.link is None:
            return
        if not self.link.gone.done():
            done, _ = await asyncio.wait({self.link.gone}, timeout=patience)
            if not done:
                self.link.kill()
                await asyncio.wait({self.link.gone})

    async def exited(self) -> Exit:
        """Wait for its end."""
        assert self.link is not None
        await asyncio.wait({self.link.gone})
        assert self.exit is not None
        return self.exit

    def _send(self, frame: bytes) -> None:
        if self.link is not None:
            self.link.send(frame)

    def _kill(self) -> None:
        if self.link is not None:
            self.link.kill()
        else:
            self._unwanted = True

    def _end_by(self, deadline: float | None) -> None:
        if self.link is None:
            self._unwanted = True
            return
        if self.exit is not None:
            return
        if self.welcome is None:  # still loading: nobody wants the model any more
            self._ending = True
            self.link.kill()
            return
        if deadline is None:
            if not self._ending:
                self._ending = True
                self._send(encode([Shutdown(None)]))
            return
        if self._deadline is not None and self._deadline <= deadline:
            return
        self._ending, self._deadline = True, deadline
        left = max(0.0, deadline - time.monotonic())
        self._send(encode([Shutdown(left)]))
        for timer in self._timers:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(left + _TERMINATE_AFTER, self.link.terminate),
            loop.call_later(left + _KILL_AFTER, self.link.kill),
        ]

    def _receive(self, frame: bytes) -> None:
        try:
            messages = decode_from_server(frame)
        except WireError as error:
            self._verdict = f"it said something that makes no sense ({error})"
            self._kill()
            return
        with waking_together():
            for message in messages:
                self._take(message)

    def _take(self, message: ToClient) -> None:
        match message:
            case ProgressUpdate(number=0):
                self.liveness.seen()
                if self._on_progress is not None:
                    self._on_progress(Progress(message.phase, message.done, message.total))
            case ErrorReply(number=0):
                self._start_error = error_from_wire(message)
                self._set_ready()
            case Refused():
                self._refusal = message.reason
                self._start_error = EngineDead(f"the engine refuses: {message.reason}")
                self._set_ready()
            case Chunk() | Done() | Facts() | CacheFileDone() | ErrorReply() | ProgressUpdate():
                self.calls.answered(message)
            case Heartbeat():
                self.liveness.beat(message)
                self._told(message.stats)
                self.calls.cancel_orphans()
                if self.stats is not None and self.stats.state == "failed" and not message.pending:
                    self._verdict = _FAILED  # everybody has been told why
                    self._kill()
            case BudgetTaken():
                if self._part is not None:
                    self._part.took(message.memory, message.used)
            case Welcome():
                self.welcome = message
                self._told(message.stats)
                self.liveness.beat(Heartbeat(phase="idle"))
                self._set_ready()
            case Draining():
                _log.info("%s: %s", self._name, message.reason)
                self._on_draining(self)
            case Stopped():
                self._stopped = True

    def _told(self, stats: EngineStats | None) -> None:
        self.stats = stats or self.stats
        if stats is not None and self._part is not None:
            self._part.told(stats.memory)

    def _set_ready(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    async def _watch_over(self, link: Link, limits: Watchdog) -> None:
        if (verdict := await self.liveness.watch(self._name, link, limits)) is not None:
            self._verdict = verdict
            await link.dump_stacks()
            link.kill()

    def _interpreter_exits(self) -> None:
        """Tell of the end now: nobody would hear of it later."""
        if self.exit is None and self.link is not None:
            self._ended(Ending("the interpreter is shutting down"))
            self.link.kill()

    def _gone(self, gone: asyncio.Future[Ending]) -> None:
        if self.exit is None:
            self._ended(gone.result())

    def _ended(self, ending: Ending) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for timer in self._timers:
            timer.cancel()
        if self.stats is not None:  # it has not told of those that end with it
            failed, cancelled = self.calls.requests()
            self.stats = replace(
                self.stats,
                failed=self.stats.failed + failed,
                cancelled=self.stats.cancelled + cancelled,
            )
        self.exit = Exit(
            self._kind(ending),
            "; ".join(text for text in (self._verdict, self._refusal, ending.detail) if text),
            ending.exit_code,
            ending.signal_name,
            self.liveness.heartbeat.phase,
            ending.stderr,
        )
        if self._part is not None:
            self._part.close()
        with waking_together():
            self._on_exit(self.exit)  # callers who are told find the engine in its new state
            self.calls.lost(self.exit.error)

    def _kind(self, ending: Ending) -> ExitKind:
        if self._verdict is not None:
            return "crash" if self._verdict == _FAILED else "stalled"
        if self._stopped or ending.signal_name == "SIGTERM":
            return "graceful"
        if self._ending and (ending.exit_code == 0 or self.welcome is None):
            return "graceful"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._verdict = "it did not end by the deadline of its shutdown"
            return "stalled"
        return "crash"


async def _first(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done; its outcome is not looked at."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
