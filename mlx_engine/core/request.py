"""A request at work, as far as it needs no MLX: its way from its caller to its end."""

from __future__ import annotations

import abc
import asyncio
import contextvars
import math
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.stream import Emit
from mlx_engine.core.wakeup import running_loop
from mlx_engine.errors import (
    ContextLengthExceeded,
    MLXEngineError,
    describe,
    drop_frames,
    failed_by,
)
from mlx_engine.outputs import (
    FinishReason,
    GenerationResult,
    Progress,
    ProgressCallback,
    Timings,
    ToolCall,
)
from mlx_engine.requests import GenerationRequest


def final_reason(
    reason: FinishReason, calls: Sequence[ToolCall], *, by_string: bool
) -> FinishReason:
    """The finish reason that a caller is told: calls are one, if the answer ended by itself.

    Args:
        by_string: whether a stop string has ended it.
    """
    called = reason == "stop" and not by_string and any(call.ok for call in calls)
    return "tool_calls" if called else reason


Serve = Callable[[Any], Awaitable[GenerationResult]]


class RequestTimer:
    """Moments of a request, by ``time.perf_counter``; 0 has not come.

    Attributes:
        preemptions: times that it left its batch to make room, and was to come back.
    """

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.started = 0.0
        self.prefilled = 0.0
        self.first_token = 0.0
        self.last_token = 0.0
        self.ended = 0.0
        self.preemptions = 0
        self._paused = 0.0  # since when it is paused, if it is
        self._pauses = 0.0  # seconds of those that are over

    @property
    def preempted(self) -> float:
        """Seconds that it was paused, until now if it still is."""
        if not self._paused:
            return self._pauses
        return self._pauses + (self.ended or time.perf_counter()) - self._paused

    def pause(self) -> None:
        """Its work stops, to go on later."""
        self._paused = self._paused or time.perf_counter()

    def resume(self) -> None:
        """Its work is where it was when it stopped, if it had."""
        self._pauses, self._paused = self.preempted, 0.0

    def timings(self, prefilled_tokens: int, completion_tokens: int) -> Timings:
        """Durations between them; of a request that is not over, until now."""
        end = self.ended or time.perf_counter()
        prefill = self.prefilled - self.started if self.prefilled else 0.0
        decode = self.last_token - self.first_token
        return Timings(
            queued=(self.started or end) - self.submitted,
            prefill=prefill,
            time_to_first_token=self.first_token - self.submitted if self.first_token else 0.0,
            decode=decode,
            total=end - self.submitted,
            prompt_tokens_per_second=prefilled_tokens / prefill if prefill else 0.0,
            tokens_per_second=(completion_tokens - 1) / decode if decode else 0.0,
            preempted=self.preempted,
        )


class ActiveRequest(abc.ABC):
    """A request that an engine in this process has been asked for. See ``Producer``.

    Args:
        asked: what the caller wants.
        request_id: the engine's name for it.
        on_progress: told of the prefill, in the event loop of the caller.
        serve: has it done, and gives its result; ``None`` if it is never run.

    Attributes:
        asked: as it was given.
        prompt: token ids, once prepared.
        limit: tokens that may be generated, once prepared; ``None`` is without limit.
        context: the context variables of the caller, for code of the caller's.
    """

    def __init__(
        self,
        asked: GenerationRequest,
        request_id: str,
        on_progress: ProgressCallback | None = None,
        serve: Serve | None = None,
    ) -> None:
        self.asked = asked
        self.request_id = request_id
        self.priority = asked.priority
        self.prompt: list[int] = []
        self.limit = asked.params.max_tokens
        self.context: contextvars.Context | None = None
        self._params = asked.params
        self._on_progress = on_progress
        self._serve = serve
        self._emit: Emit | None = None
        self._stopped = False
        self._deadline = math.inf  # by time.perf_counter; once its work has begun
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer = RequestTimer()
        self._tokens: list[int] = []
        self._cached_tokens = 0
        self._finish_reason: FinishReason = "cancelled"

    @property
    def max_wait(self) -> float | None:
        """Seconds that it may wait for its turn, if its caller has a limit of his own."""
        return self.asked.max_wait

    def run(self, emit: Emit | None) -> Awaitable[GenerationResult]:
        """Begin it, for a caller who waits in this event loop; see ``Producer``."""
        self._timer.submitted = time.perf_counter()
        self._loop = running_loop()
        self._on_progress = in_this_loop(self._on_progress)
        self._emit = emit
        if self._params.logits_processors:
            self.context = contextvars.copy_context()
        assert self._serve is not None, "nobody is there to do it"
        return self._serve(self)

    def cancel(self) -> None:
        """Ask it to stop at its next token or prefill chunk. From any thread."""
        self._stopped = True

    @abc.abstractmethod
    def result(self) -> GenerationResult:
        """The result so far; final once it is over."""

    def partial_result(self) -> GenerationResult:
        """See ``Producer``."""
        return self.result()

    @property
    def tokens(self) -> list[int]:
        """Token ids that have been generated so far."""
        return self._tokens

    @property
    def should_stop(self) -> bool:
        """Whether it was cancelled, its ``timeout`` is over, or its event loop is closed, so that
        nobody waits for it.
        """
        return self.stop_reason is not None

    @property
    def stop_reason(self) -> FinishReason | None:
        """The finish reason with which it should stop now; ``None`` if it should go on.

        A time limit is looked at where cancellations are, so that it holds wherever they do, and
        ends the request in the same way; but its caller gets a result. What comes first counts:
        one that was cancelled in time stays cancelled.
        """
        if self._stopped or (self._loop is not None and self._loop.is_closed()):
            return "cancelled"
        return "timeout" if time.perf_counter() >= self._deadline else None

    def work_begins(self) -> None:
        """Its turn has come: from now on its ``timeout`` counts, however often it makes way."""
        if self._timer.started:
            return
        self._timer.started = time.perf_counter()
        if self.asked.timeout is not None:
            self._deadline = self._timer.started + self.asked.timeout

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._timer.ended > 0

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities belong to its tokens."""
        return self._params.logprobs is not None

    def progress(self, done: int, phase: Literal["score", "prefill"] = "prefill") -> None:
        """So many tokens of the prompt are in the KV cache, or in the one that scores them."""
        if self._on_progress is not None:
            self._on_progress(Progress(phase, done, len(self.prompt)))

    def prefill_begins(self, cached: int) -> None:
        """Begin its prefill, behind ``cached`` tokens that need none."""
        self._cached_tokens = cached
        self.progress(cached)

    def prefilled(self) -> None:
        """The prompt is in the KV cache, but for its last token; for the first time, or again."""
        self._timer.prefilled = self._timer.prefilled or time.perf_counter()
        self._timer.resume()

    def failed(self, error: BaseException) -> MLXEngineError:
        """End it; the error that its caller gets, without the frames that ``error`` holds."""
        self._timer.ended = time.perf_counter()
        if isinstance(error, MLXEngineError):
            drop_frames(error)
            return error
        failed = failed_by(error, f"{self.request_id} failed: {describe(error)}")
        if error.__traceback__ is not None:
            where = f"On the thread {threading.current_thread().name!r}:\n"
            error.add_note("".join([where, *traceback.format_exception(error)]))
        drop_frames(error)
        return failed

    def fit(self, context: int | None) -> None:
        """Set the limit by the room that the prompt leaves in a context of so many tokens.

        Raises:
            ContextLengthExceeded: there is too little.
        """
        length, wanted = len(self.prompt), self._params.max_tokens
        if context is None:
            return
        room = context - length
        if room < (1 if wanted is None else wanted):
            advice = "shorten the prompt"
            if wanted is not None and room > 0:
                advice += f", or lower max_tokens to {room} or None (as many as fit)"
            raise ContextLengthExceeded(
                f"{length} prompt tokens and max_tokens={wanted} do not fit into the "
                f"model's context of {context} tokens (the engine's context_length); {advice}",
                prompt_tokens=length,
                max_tokens=wanted,
                context_length=context,
                option=self.asked.source.option,
            )
        self.limit = room if wanted is None else wanted
