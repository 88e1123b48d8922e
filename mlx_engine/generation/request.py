"""Requests at work: prompt, tokens so far, text, and how they end. Nothing is run here."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_engine.core.request import ActiveRequest, Serve
from mlx_engine.core.stop import checkpoint, stoppable
from mlx_engine.core.stream import emit_pieces
from mlx_engine.core.work import call_in
from mlx_engine.errors import (
    GenerationError,
    MLXEngineError,
)
from mlx_engine.generation.prompt import encode
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
    ProgressCallback,
    TokenLogprob,
    Usage,
)
from mlx_engine.requests import ChatPrompt, GenerationRequest
from mlx_engine.strategies import Strategies


class Request(ActiveRequest):
    """A request at work: prepared once, given token after token, and asked for its result.

    Args:
        asked, request_id, on_progress, serve: those of every ``ActiveRequest``.
        strategies: how to prefill and to decode it.

    Attributes:
        places: numbers of its first tokens with which other prompts are likely to begin too.
        sampling: what chooses its tokens, once its work has begun.
    """

    def __init__(
        self,
        asked: GenerationRequest,
        request_id: str,
        on_progress: ProgressCallback | None = None,
        serve: Serve | None = None,
        strategies: Strategies | None = None,
    ) -> None:
        super().__init__(asked, request_id, on_progress, serve)
        self.strategies = strategies or Strategies()
        self.places: tuple[int, ...] = ()
        self.sampling: Sampling | None = None
        self._text: TextAssembler | None = None
        self._make_sampling: Callable[[], Sampling] | None = None  # once prepared
        self._ends: frozenset[int] = frozenset()  # token ids that end the answer
        self._logprobs: list[TokenLogprob] = []
        self._notes: tuple[str, ...] = ()
        self._draft_tokens = self._accepted_tokens = 0
        self._kept: tuple[tuple[int, int], ...] | None = None

    @property
    def open_ended(self) -> bool:
        """Whether it asks for as many tokens as fit."""
        return self._params.max_tokens is None

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
        self._fit(vocabulary.context_length)
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
        self._timer.started = time.perf_counter()
        make, self._make_sampling = self._make_sampling, None
        if make is None or self.should_stop:
            self.cancelled()
            return False
        self.sampling = make()
        return True

    def note(self, text: str) -> None:
        """Tell in the result, once, that something is done in another way than asked."""
        if text not in self._notes:
            self._notes += (text,)

    def kept(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Note that the model sees these parts of the prompt only."""
        self._kept = tuple(ranges)

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
            self._timer.first_token = now
            self.progress(len(self.prompt))
        self._timer.last_token = now
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
        self.sampling = None
        return super().failed(error)

    def result(self) -> GenerationResult:
        """The result as it is so far; final once the request is over."""
        text = self._text
        return GenerationResult(
            text=text.content if text else "",
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason,
            usage=self._usage(),
            timings=replace(
                self._timer.timings(len(self.prompt) - self._cached_tokens, len(self._tokens)),
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
        self._timer.ended = time.perf_counter()
        self.sampling = None  # it has arrays, and is dropped where they were made
        if self._emit is not None:
            logprobs = tuple(self._logprobs[-1:]) if tokens else ()
            emit_pieces(self._emit, pieces, tokens, logprobs, reason)
