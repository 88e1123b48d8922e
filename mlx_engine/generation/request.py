"""Requests at work: prompt, tokens so far, text, and how they end. Nothing is run here."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx

from mlx_engine.config import Strategies
from mlx_engine.core.event_loop import running_loop
from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.core.stream import Emit, emit_pieces
from mlx_engine.core.timer import RequestTimer
from mlx_engine.core.work import call_in
from mlx_engine.errors import (
    ContextLengthExceeded,
    GenerationError,
    MLXEngineError,
    describe,
    drop_frames,
)
from mlx_engine.generation.prompt import encode, option_of
from mlx_engine.generation.sampling import (
    Sampling,
    check_sampling,
    make_sampling,
    token_logprob,
)
from mlx_engine.generation.text import Piece, TextAssembler
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.outputs import (
    FinishReason,
    GenerationResult,
    Progress,
    ProgressCallback,
    TokenLogprob,
    Usage,
)
from mlx_engine.params import SamplingParams
from mlx_engine.requests import ChatPrompt, TextPrompt


class Request:
    """A request at work: prepared once, given token after token, and asked for its result.

    Args:
        source: the prompt or chat.
        params: how to sample and when to stop.
        request_id: the engine's name for it.
        on_progress: told of the prefill, in the event loop of the caller.
        priority: of the caller's choice; lower goes first.
        strategies: how to prefill and to decode it.

    Attributes:
        prompt: token ids, once prepared.
        places: numbers of its first tokens with which other prompts are likely to begin too.
        limit: how many tokens may be generated, once prepared; ``None`` is without limit.
        sampling: what chooses its tokens, once its work has begun.
        context: the context variables of the caller, for code of the caller's.
    """

    def __init__(
        self,
        source: TextPrompt | ChatPrompt,
        params: SamplingParams,
        request_id: str,
        on_progress: ProgressCallback | None = None,
        priority: int = 0,
        strategies: Strategies | None = None,
    ) -> None:
        self.request_id = request_id
        self.priority = priority
        self.strategies = strategies or Strategies()
        self.prompt: list[int] = []
        self.places: tuple[int, ...] = ()
        self.limit: int | None = None
        self.sampling: Sampling | None = None
        self.context: contextvars.Context | None = None
        self._source = source
        self._params = params
        self._on_progress = on_progress
        self._emit: Emit | None = None
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clock = RequestTimer()
        self._text: TextAssembler | None = None
        self._make_sampling: Callable[[], Sampling] | None = None  # once prepared
        self._ends: frozenset[int] = frozenset()  # token ids that end the answer
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._notes: tuple[str, ...] = ()
        self._cached_tokens = 0
        self._draft_tokens = self._accepted_tokens = 0
        self._kept: tuple[tuple[int, int], ...] | None = None
        self._finish_reason: FinishReason = "cancelled"

    @property
    def tokens(self) -> list[int]:
        """Token ids generated so far."""
        return self._tokens

    @property
    def open_ended(self) -> bool:
        """Whether it asks for as many tokens as fit."""
        return self._params.max_tokens is None

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._clock.ended > 0

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are to be given to ``take``."""
        return self._params.logprobs is not None

    @property
    def should_stop(self) -> bool:
        """Whether it was cancelled, or its event loop closed, so that nobody waits for it."""
        return self._stopped or (self._loop is not None and self._loop.is_closed())

    def submitted(
        self,
        in_this_loop: Callable[[ProgressCallback | None], ProgressCallback | None],
        emit: Emit | None,
    ) -> None:
        """Note that the caller waits from now on, in this event loop, where progress is told.

        Args:
            emit: gets each chunk at once; ``None`` makes no chunks.
        """
        self._clock.submitted = time.perf_counter()
        self._loop = running_loop()
        self._on_progress = in_this_loop(self._on_progress)
        self._emit = emit
        if self._params.logits_processors:
            self.context = contextvars.copy_context()

    def cancel(self) -> None:
        """Ask it to stop at its next token or prefill chunk. From any thread."""
        self._stopped = True

    def prepare(self, vocabulary: Vocabulary) -> None:
        """Make the prompt into tokens, and check the options. On any thread, without MLX.

        Raises:
            InvalidRequest: the prompt or an option does not suit this model.
            Interrupted: it was cancelled.
            Exception: whatever a tokenizer or chat template raises.
        """
        with stoppable(lambda: self.should_stop):
            checkpoint()
            encoded = encode(self._source, vocabulary)
        self.prompt, self.places = encoded.tokens, encoded.places
        self._notes += encoded.notes
        self.limit = self._fit(vocabulary)
        check_sampling(self._params, vocabulary.vocab_size)
        self._make_sampling = functools.partial(
            make_sampling,
            self._params,
            vocab_size=vocabulary.vocab_size,
            xtc_special_tokens=(*vocabulary.newline_tokens, *sorted(vocabulary.eos)),
        )
        self._text = TextAssembler(
            vocabulary.tokenizer,
            stop=tuple(self._params.stop),
            initial_state=encoded.initial_state,
            tools=self._source.tools if isinstance(self._source, ChatPrompt) else None,
        )
        stops = frozenset(self._params.stop_token_ids)
        self._ends = stops if self._params.ignore_eos else vocabulary.eos | stops

    def begin(self) -> bool:
        """Begin on the MLX thread, with a sampler; ``False`` if it was cancelled.

        Raises:
            InvalidRequest: a logits processor cannot be imported.
        """
        self._clock.started = time.perf_counter()
        make, self._make_sampling = self._make_sampling, None
        if make is None or self.should_stop:
            self.cancelled()
            return False
        self.sampling = make()
        return True

    def prefill_begins(self, cached: int) -> None:
        """Note that prefill begins, behind ``cached`` tokens that need none."""
        self._cached_tokens = cached
        self.progress(cached)

    def progress(self, done: int, phase: Literal["score", "prefill"] = "prefill") -> None:
        """Tell that ``done`` tokens of the prompt are in the KV cache, or in the scoring one."""
        if self._on_progress is not None:
            self._on_progress(Progress(phase, done, len(self.prompt)))

    def note(self, text: str) -> None:
        """Tell in the result, once, that something is done in another way than asked."""
        if text not in self._notes:
            self._notes += (text,)

    def kept(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Note that the model sees these parts of the prompt only."""
        self._kept = tuple(ranges)

    def prefilled(self) -> None:
        """Note that the prompt is in the KV cache, but for its last token."""
        self._clock.prefilled = time.perf_counter()

    def take(self, token: int, logprobs: mx.array | None) -> bool:
        """Take the next token; whether the answer is complete with it.

        Args:
            logprobs: of shape (vocabulary,); needed if ``wants_logprobs``.

        Raises:
            Exception: whatever the tokenizer raises.
        """
        text = self._text
        assert text is not None
        now = time.perf_counter()
        if not self._tokens:
            self._clock.first_token = now
            self.progress(len(self.prompt))
        self._clock.last_token = now
        self._tokens.append(token)
        if self._params.logprobs is not None and logprobs is not None:
            self._logprobs.append(token_logprob(token, logprobs, self._params.logprobs))
        pieces = [] if token in self._ends else text.add(token)
        reason: FinishReason | None = None
        if token in self._ends or text.stopped:
            reason = "stop"
        elif len(self._tokens) == self.limit:
            reason = "length"
        elif self.should_stop:
            reason = "cancelled"
        if reason is not None:
            self._finish(reason, (token,), pieces)
            return True
        if self._emit is not None:
            emit_pieces(self._emit, pieces, (token,), tuple(self._logprobs[-1:]))
        return False

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits of shape (1, vocabulary) after its processors, which see the caller's context.

        Args:
            tokens: of shape (n,), uint32: all that the logits follow.

        Raises:
            Exception: whatever a processor raises.
        """
        assert self.sampling is not None
        processed = logits
        for processor in self.sampling.processors:
            if self.context is None:
                processed = processor(tokens, processed)
            else:
                processed = call_in(self.context, processor, tokens, processed)
        if not isinstance(processed, mx.array) or processed.shape != logits.shape:
            got = getattr(processed, "shape", type(processed).__name__)
            raise ValueError(
                f"a logits processor must return an mx.array of shape {logits.shape}, not {got}"
            )
        return processed.astype(logits.dtype)

    def process_now(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Processed logits, evaluated if the caller has processors: what fails then is theirs.

        Raises:
            GenerationError: the processors leave nothing to sample.
        """
        processed = self.process(tokens, logits)
        if self.context is not None:
            before, after = (mx.isfinite(mx.logsumexp(each)) for each in (logits, processed))
            mx.eval(processed, before, after)
            if before.item() and not after.item():
                raise self.nothing_to_sample(by_model=False)
        return processed

    def nothing_to_sample(self, *, by_model: bool) -> GenerationError:
        """The error that its caller is told when no token can be chosen.

        Args:
            by_model: whether the model's own logits were so.
        """
        if not by_model:
            return GenerationError(
                f"{self.request_id} failed: its logits processors leave nothing to sample (a NaN, "
                "an infinite logit, or -inf for every token); let them exclude tokens with -inf, "
                "and never all of them"
            )
        advice = "check its files, or convert it to bfloat16 or float32"
        if self.sampling is not None and self.sampling.processors:
            advice += "; or a logit_bias or a penalty of this request is too large for it"
        return GenerationError(
            f"{self.request_id} failed: the model's logits are NaN or infinite, so that no token "
            "can be sampled; its weights are broken, or its numbers overflow in half precision: "
            f"{advice}"
        )

    def drafted(self, proposed: int, accepted: int) -> None:
        """Count tokens that were proposed for it, and those of them that were right."""
        self._draft_tokens += proposed
        self._accepted_tokens += accepted

    def ended_without_tokens(self) -> None:
        """End the request: no tokens were asked for."""
        self.progress(len(self.prompt))
        self._finish("length", (), [])

    def cancelled(self) -> None:
        """End the request, cancelled."""
        self._finish("cancelled", (), [])

    def failed(self, error: BaseException) -> MLXEngineError:
        """End the request; the error for its caller, without the frames that ``error`` holds."""
        self._clock.ended = time.perf_counter()
        self.sampling = None
        if isinstance(error, MLXEngineError):
            drop_frames(error)
            return error
        failed = GenerationError(f"{self.request_id} failed: {describe(error)}")
        if error.__traceback__ is not None:
            where = f"On the thread {threading.current_thread().name!r}:\n"
            error.add_note("".join([where, *traceback.format_exception(error)]))
        drop_frames(error)
        failed.__cause__ = error
        return failed

    def result(self) -> GenerationResult:
        """The result as it is so far; final once the request is over."""
        text = self._text
        return GenerationResult(
            text=text.content if text else "",
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason,
            usage=self._usage(),
            timings=replace(
                self._clock.timings(len(self.prompt) - self._cached_tokens, len(self._tokens)),
                draft_tokens=self._draft_tokens,
                accepted_tokens=self._accepted_tokens,
            ),
            reasoning=text.reasoning if text else "",
            tool_calls=text.tool_calls if text else (),
            logprobs=tuple(self._logprobs),
            notes=self._notes,
            request_id=self.request_id,
        )

    def _usage(self) -> Usage:
        usage = Usage(len(self.prompt), len(self._tokens), self._cached_tokens)
        if self._kept is None:
            return usage
        asked = self.strategies.prefill
        return replace(
            usage,
            kept_tokens=sum(end - start for start, end in self._kept),
            kept_ranges=self._kept if asked is not None and asked.report_ranges else None,
        )

    def _finish(self, reason: FinishReason, tokens: tuple[int, ...], pieces: list[Piece]) -> None:
        """Let out what was held back, with the last token and its pieces if there is one."""
        text = self._text
        if text is not None:
            pieces = pieces + text.finish()
            if text.stopped and reason == "length":
                reason = "stop"  # by a stop string that was held back until now
        self._finish_reason = reason
        self._clock.ended = time.perf_counter()
        self.sampling = None  # it has arrays, and is dropped where they were made
        if self._emit is not None:
            logprobs = tuple(self._logprobs[-1:]) if tokens else ()
            emit_pieces(self._emit, pieces, tokens, logprobs, reason)

    def _fit(self, vocabulary: Vocabulary) -> int | None:
        context, wanted = vocabulary.context_length, self._params.max_tokens
        length = len(self.prompt)
        if context is None:
            return wanted
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
                option=option_of(self._source),
            )
        return room if wanted is None else wanted
