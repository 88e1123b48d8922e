"""Requests at work: prompt, tokens so far, text, and how they end. Nothing is run here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_engine.core.request import ActiveRequest, Serve, final_reason
from mlx_engine.core.stream import emit_pieces
from mlx_engine.errors import GenerationError, MLXEngineError, for_good
from mlx_engine.outputs import (
    FinishReason,
    GenerationResult,
    ProgressCallback,
    TokenLogprob,
    Usage,
)
from mlx_engine.requests import GenerationRequest
from mlx_engine.strategies import Strategies

if TYPE_CHECKING:  # a request may be made before MLX is there: when its engine has not started
    import mlx.core as mx

    from mlx_engine.core.stream import Piece
    from mlx_engine.generation.sampling import Sampling
    from mlx_engine.generation.text import TextAssembler


class Request(ActiveRequest):
    """A request at work: prepared once, given token after token, and asked for its result.

    Args:
        asked, request_id, on_progress, serve: those of every ``ActiveRequest``.
        strategies: how to prefill and to decode it.

    Attributes:
        places: numbers of its first tokens with which other prompts are likely to begin too.
        sampling: what chooses its tokens, once its work has begun.
        note_if_empty: told in the result if its answer ends before any text.
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
        self.note_if_empty = ""
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

    def prepared(
        self, text: TextAssembler, make_sampling: Callable[[], Sampling], ends: frozenset[int]
    ) -> None:
        """Note what its work needs.

        Args:
            text: takes its tokens.
            make_sampling: gives what chooses them; called on the MLX thread.
            ends: token ids that end the answer.
        """
        self._text, self._make_sampling, self._ends = text, make_sampling, ends

    def begin(self) -> bool:
        """Begin on the MLX thread, with a sampler; ``False`` if it should stop already.

        Raises:
            InvalidRequest: a logits processor cannot be imported.
        """
        self.work_begins()
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

    def preempted(self) -> None:
        """Its work stops to make room for others, and will go on later."""
        self._timer.pause()
        self._timer.preemptions += 1

    def interrupted(self) -> None:
        """Its work stops, since MLX has failed at that of another, and will go on later."""
        self._timer.pause()
        self.note("MLX failed at the work of another request, and its KV cache was computed again")

    def resumed(self) -> None:
        """Its work goes on."""
        self._timer.resume()

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
            assert self.sampling is not None
            self._logprobs.append(self.sampling.logprob(token, logprobs, self._params.logprobs))
        pieces = [] if token in self._ends else text.add(token)
        reason: FinishReason | None = None
        if token in self._ends or text.stopped:
            reason = "stop"
        elif len(self._tokens) == self.limit:
            reason = "length"
        else:
            reason = self.stop_reason
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
        return self.sampling.process(tokens, logits, self.context)

    def process_now(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Processed logits, evaluated if the caller has processors: what fails then is theirs.

        Raises:
            GenerationError: the processors leave nothing to sample.
        """
        if self.context is None:
            return self.process(tokens, logits)
        assert self.sampling is not None
        processed, left = self.sampling.process_now(tokens, logits, self.context)
        if not left:
            raise self.nothing_to_sample(by_model=False)
        return processed

    def nothing_to_sample(self, *, by_model: bool) -> GenerationError:
        """The error that its caller is told when no token can be chosen.

        Args:
            by_model: whether the model's own logits were so.
        """
        return for_good(self._nothing_to_sample(by_model))

    def _nothing_to_sample(self, by_model: bool) -> GenerationError:
        if not by_model:
            return GenerationError(
                f"{self.request_id} failed: its logits processors leave nothing to sample (a NaN, "
                "an infinite logit, or -inf for every token); let them exclude tokens with -inf, "
                "and never all of them"
            )
        if self.sampling is not None and self.sampling.grammar is not None:
            return GenerationError(
                f"{self.request_id} failed: none of the tokens that its constraint does allow can "
                "be sampled: all were excluded by logits processors, logit_bias or the end of "
                "reasoning (max_reasoning_tokens), or the model's logits are NaN"
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
        """End the request, which should stop: cancelled, or by its ``timeout``."""
        self._finish(self.stop_reason or "cancelled", (), [])

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
            notes=self._notes + self._pauses(),
            request_id=self.request_id,
            stop_string=text.stop_string if text else None,
        )

    def _pauses(self) -> tuple[str, ...]:
        count, seconds = self._timer.preemptions, self._timer.preempted
        if not count:
            return ()
        often = "once" if count == 1 else f"{count} times"
        return (
            f"preempted {often}, and paused for {seconds:.3g} s: there was no memory for its KV "
            "cache beside those of other requests (kv_cache_memory_bytes)",
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
            if text.stopped and reason in ("length", "timeout"):
                reason = "stop"  # by a stop string that was held back until now
            reason = final_reason(reason, text.tool_calls, by_string=text.stopped)
            if self.note_if_empty and reason == "stop" and not (text.content or text.stopped):
                self.note(self.note_if_empty)
        self._finish_reason = reason
        self._timer.ended = time.perf_counter()
        self.sampling = None  # it has arrays, and is dropped where they were made
        if self._emit is not None:
            logprobs = tuple(self._logprobs[-1:]) if tokens else ()
            emit_pieces(self._emit, pieces, tokens, logprobs, reason)
