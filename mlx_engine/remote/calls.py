"""Calls: what has been asked of an engine elsewhere and is not over yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import astuple

from mlx_engine.core.stream import Emit
from mlx_engine.core.work import PendingWork, Stage
from mlx_engine.core.work_queue import WorkQueue
from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import GenerationChunk, GenerationResult, Progress, ProgressCallback
from mlx_engine.questions import PromptFacts
from mlx_engine.remote.wire.messages import (
    CacheFileDone,
    Cancel,
    Chunk,
    Done,
    ErrorReply,
    Facts,
    ProgressUpdate,
    encode,
)
from mlx_engine.remote.wire.values import error_from_wire, result_from_wire

Answer = GenerationResult | PromptFacts | int


class Call(PendingWork[Answer]):
    """A call: something asked, which a coroutine waits for.

    Args:
        calls: those over the same connection.
        frame: the payload that asks for it.
        on_done: as for every ``PendingWork``.
        emit: gets chunks, on the I/O thread.
        on_progress: told of progress, on the I/O thread.
        counted: whether it is a request, which the counters of an engine tell of.

    Attributes:
        number: its name on the wire.
        partial: what there was of a result when it was cancelled.
        unwanted: the other end is told, or will be, that nobody wants it any more.
    """

    def __init__(
        self,
        calls: Calls,
        number: int,
        frame: bytes,
        on_done: Callable[[PendingWork[Answer]], None],
        emit: Emit | None = None,
        on_progress: ProgressCallback | None = None,
        *,
        counted: bool = False,
    ) -> None:
        super().__init__(self.cancel, on_done)
        self.number = number
        self.counted = counted
        self.emit = emit
        self.on_progress = on_progress
        self.partial: GenerationResult | None = None
        self.unwanted = False
        self._calls = calls
        self._frame = frame

    def take_frame(self) -> bytes:
        """The payload that asks for it. Once: it is not kept, as it has the prompt."""
        frame, self._frame = self._frame, b""
        return frame

    def answer(self) -> Coroutine[Any, Any, Any]:
        """Its ``Answer``, to be awaited once; see ``WorkQueue.run``."""
        return self._calls.run(self)

    def cancel(self) -> None:
        """Tell the other end that nobody wants it any more. From any thread."""
        self._calls.cancel(self)


class Calls(WorkQueue[Call]):
    """The calls over one connection. They queue at the other end, not here.

    Args:
        send: sends the payload of a frame; from any thread.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send
        self._calls: dict[int, Call] = {}
        self._lost: Callable[[], MLXEngineError] | None = None

    @property
    def busy(self) -> bool:
        """True if there are any."""
        return bool(self._calls)

    @property
    def free(self) -> int:
        """0: none of them waits here."""
        return 0

    def _enter(self, call: Call) -> None:
        frame = call.take_frame()
        with self._changed:
            if self._lost is not None:
                raise self._lost()
            if call.stage is not Stage.QUEUED:
                return  # it was aborted on its way here
            call.stage = Stage.RUNNING
            call.started = time.perf_counter()
            self._calls[call.number] = call
            self._send(frame)
            if call.unwanted:
                self._send(encode([Cancel(call.number)]))

    def cancel(self, call: Call) -> None:
        """Tell the other end that nobody wants a call any more. From any thread."""
        with self._changed:
            call.unwanted = True
            if call.number in self._calls:
                self._send(encode([Cancel(call.number)]))

    def requests(self) -> tuple[int, int]:
        """Requests that are not over: those that are wanted, and those that are not any more."""
        with self._changed:
            requests = [call for call in self._calls.values() if call.counted]
        unwanted = sum(call.unwanted for call in requests)
        return len(requests) - unwanted, unwanted

    def cancel_orphans(self) -> None:
        """Cancel those whose event loop is closed: nobody waits for them any more."""
        for call in list(self._calls.values()):
            if call.orphaned:
                self._cancel(call)

    def answered(
        self, message: ProgressUpdate | Chunk | Done | Facts | CacheFileDone | ErrorReply
    ) -> None:
        """Take what the other end has said about one of them. On the I/O thread."""
        call = self._calls.get(message.number)
        if call is None:
            return
        match message:
            case Chunk():
                if call.emit is not None:
                    call.emit(GenerationChunk(*astuple(message)[1:]))  # its fields, in their order
            case ProgressUpdate():
                if call.on_progress is not None:
                    call.on_progress(Progress(message.phase, message.done, message.total))
            case Done():
                call.value = call.partial = result_from_wire(message)
                self._end(call)
            case Facts():
                call.value = message.facts
                self._end(call)
            case CacheFileDone():
                call.value = message.prompts
                self._end(call)
            case ErrorReply():
                call.error = error_from_wire(message)
                self._end(call)

    def lost(self, error: Callable[[], MLXEngineError]) -> None:
        """Tell everybody, now and later, that the other end is gone. From any thread."""
        with self._changed:
            self._lost = error
            calls = list(self._calls.values())
        for call in calls:
            call.error = error()
            self._end(call)

    def _end(self, call: Call) -> None:
        with self._changed:
            if self._calls.pop(call.number, None) is None:
                return
            call.stage = Stage.DONE
            call.ended = time.perf_counter()
        call.emit = call.on_progress = None
        call.announce()
