"""One request, from its prompt to its result, in one call on the MLX thread."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.config import ModelConfig
from mlx_engine.errors import ContextLengthExceeded, GenerationError, MLXEngineError
from mlx_engine.generation.decode import decode
from mlx_engine.generation.kv_cache import make_kv_cache
from mlx_engine.generation.prefill import prefill
from mlx_engine.generation.prompt import Input
from mlx_engine.generation.sampling import make_sampling, token_logprob
from mlx_engine.generation.text import Piece, TextAssembler
from mlx_engine.models.loading import LoadedModel
from mlx_engine.outputs import (
    FinishReason,
    GenerationChunk,
    GenerationResult,
    Progress,
    ProgressCallback,
    Timings,
    TokenLogprob,
    Usage,
)
from mlx_engine.params import SamplingParams
from mlx_engine.stream import Emit
from mlx_engine.turn import Interrupted, drop_frames


class Request:
    """A generation that can be run once, cancelled from any thread, and asked for its result.

    Args:
        source: the prompt or chat.
        params: how to sample and when to stop.
        request_id: the engine's name for it.
        on_progress: told of the prefill, in the event loop of the caller.
    """

    def __init__(
        self,
        source: Input,
        params: SamplingParams,
        request_id: str,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self.request_id = request_id
        self._source = source
        self._params = params
        self._on_progress = on_progress
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clock = _Clock()
        self._text: TextAssembler | None = None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._notes: tuple[str, ...] = ()
        self._prompt_tokens = 0
        self._finish_reason: FinishReason = "cancelled"

    def submitted(
        self, in_this_loop: Callable[[ProgressCallback | None], ProgressCallback | None]
    ) -> None:
        """The caller waits from now on, in this event loop, where progress is to be told."""
        self._clock.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._on_progress = in_this_loop(self._on_progress)

    def cancel(self) -> None:
        """Ask it to stop at its next token or prefill chunk. From any thread."""
        self._stopped = True

    def run(
        self, loaded: LoadedModel, config: ModelConfig, emit: Emit | None = None
    ) -> GenerationResult:
        """Do it, on the MLX thread. Cancelled, it returns what there is by then.

        Args:
            emit: gets each chunk at once; ``None`` makes no chunks.

        Raises:
            InvalidRequest: the prompt or an option does not suit this model.
            GenerationError: MLX, the tokenizer or a logits processor raised.
        """
        error = self._attempt(loaded, config, emit)
        del loaded, emit  # a raised error keeps this frame, and so would keep the model
        if error is not None:
            raise error
        return self.result()

    def _attempt(
        self, loaded: LoadedModel, config: ModelConfig, emit: Emit | None
    ) -> MLXEngineError | None:
        self._clock.started = time.perf_counter()
        try:
            try:
                self._run(loaded, config, emit)
            finally:
                # A step may be under way that nobody waits for any more.
                mx.synchronize(generation_stream)
        except MLXEngineError as error:
            drop_frames(error)
            return error
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
            # The border: MLX and user code raise anything, a CancelledError that is nobody's too.
            said = "".join(traceback.format_exception_only(error)).strip()
            error.add_note("".join(["On the MLX thread:\n", *traceback.format_exception(error)]))
            drop_frames(error)
            failed = GenerationError(f"{self.request_id} failed: {said}")
            failed.__cause__ = error
            return failed
        finally:
            self._clock.ended = time.perf_counter()
        return None

    def result(self) -> GenerationResult:
        """What has been made so far; final once ``run`` is over."""
        text = self._text
        return GenerationResult(
            text=text.content if text else "",
            tokens=tuple(self._tokens),
            finish_reason=self._finish_reason,
            usage=Usage(self._prompt_tokens, len(self._tokens)),
            timings=self._clock.timings(self._prompt_tokens, len(self._tokens)),
            reasoning=text.reasoning if text else "",
            tool_calls=text.tool_calls if text else (),
            logprobs=tuple(self._logprobs),
            notes=self._notes,
            request_id=self.request_id,
        )

    def _run(self, loaded: LoadedModel, config: ModelConfig, emit: Emit | None) -> None:
        encoded = self._source.encode(loaded)
        prompt = encoded.tokens
        self._notes = encoded.notes
        self._prompt_tokens = len(prompt)
        limit = self._fit(loaded, len(prompt))
        sampling = make_sampling(
            self._params,
            vocab_size=loaded.vocab_size,
            xtc_special_tokens=(*loaded.newline_tokens, *sorted(loaded.eos)),
        )
        self._text = TextAssembler(
            loaded.tokenizer,
            stop=tuple(self._params.stop),
            initial_state=encoded.initial_state,
            tools=self._source.tools,
        )
        try:
            cache = make_kv_cache(loaded.model, config)
            self._report(0)
            prefill(
                loaded.model,
                cache,
                prompt,
                config,
                should_stop=self._should_stop,
                on_progress=self._report,
            )
            self._clock.prefilled = time.perf_counter()
            with closing(
                decode(
                    loaded.model,
                    cache,
                    prompt,
                    sampling,
                    config,
                    limit,
                    should_stop=self._should_stop,
                )
            ) as steps:
                self._collect(steps, self._text, loaded.eos, limit, emit)
        except Interrupted:
            self._finish("cancelled", self._text, emit)

    def _collect(
        self,
        steps: Iterable[tuple[int, mx.array]],
        text: TextAssembler,
        eos: frozenset[int],
        limit: int | None,
        emit: Emit | None,
    ) -> None:
        """Take tokens until one of them, or the text they make, is the last."""
        ends = eos.union(self._params.stop_token_ids)
        silent = ends  # these are signals, not text
        if self._params.ignore_eos:
            ends = frozenset(self._params.stop_token_ids)
        for token, logprobs in steps:
            self._token(token, logprobs)
            pieces = [] if token in silent else text.add(token)
            reason: FinishReason | None = None
            if token in ends or text.stopped:
                reason = "stop"
            elif len(self._tokens) == limit:
                reason = "length"
            elif self._should_stop():
                reason = "cancelled"
            if reason is not None:
                self._finish(reason, text, emit, token, pieces)
                return
            if emit is not None:
                emit_pieces(emit, pieces, (token,), tuple(self._logprobs[-1:]))

    def _should_stop(self) -> bool:
        """Whether it was cancelled, or its event loop closed, so that nobody waits for it."""
        return self._stopped or (self._loop is not None and self._loop.is_closed())

    def _token(self, token: int, logprobs: mx.array) -> None:
        now = time.perf_counter()
        if not self._tokens:
            self._clock.first_token = now
            self._report(self._prompt_tokens)
        self._clock.last_token = now
        self._tokens.append(token)
        if self._params.logprobs is not None:
            self._logprobs.append(token_logprob(token, logprobs, self._params.logprobs))

    def _finish(
        self,
        reason: FinishReason,
        text: TextAssembler,
        emit: Emit | None,
        token: int | None = None,
        pieces: list[Piece] | None = None,
    ) -> None:
        """Let out what was held back, with the last token and its pieces if there is one."""
        pieces = (pieces or []) + text.finish()
        if text.stopped and reason == "length":
            reason = "stop"  # by a stop string that was held back until now
        self._finish_reason = reason
        if emit is not None:
            tokens = () if token is None else (token,)
            logprobs = () if token is None else tuple(self._logprobs[-1:])
            emit_pieces(emit, pieces, tokens, logprobs, reason)

    def _fit(self, loaded: LoadedModel, prompt_tokens: int) -> int | None:
        """How many tokens may be generated; ``None`` is without limit."""
        context, wanted = loaded.context_length, self._params.max_tokens
        if context is None:
            return wanted
        room = context - prompt_tokens
        if room < (wanted or 1):
            advice = "shorten the prompt"
            if wanted is not None and room > 0:
                advice += f", or lower max_tokens to {room} or None (as many as fit)"
            raise ContextLengthExceeded(
                f"{prompt_tokens} prompt tokens and max_tokens={wanted} do not fit into the "
                f"model's context of {context} tokens (the engine's context_length); {advice}",
                prompt_tokens=prompt_tokens,
                max_tokens=wanted,
                context_length=context,
                option=self._source.option,
            )
        return room if wanted is None else wanted

    def _report(self, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress("prefill", done, self._prompt_tokens))


def emit_pieces(
    emit: Emit,
    pieces: list[Piece],
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...] = (),
    finish_reason: FinishReason | None = None,
) -> None:
    """Emit one chunk for each piece, at least one; the token goes with the first."""
    last = len(pieces) - 1
    if last <= 0:
        segment, text = pieces[0] if pieces else ("content", "")
        emit(GenerationChunk(text, tokens, segment, logprobs, finish_reason))
        return
    for index, (segment, text) in enumerate(pieces):
        reason = finish_reason if index == last else None
        if index == 0:
            emit(GenerationChunk(text, tokens, segment, logprobs, reason))
        else:
            emit(GenerationChunk(text, (), segment, (), reason))


class _Clock:
    """Moments of a request, by ``time.perf_counter``; 0 has not come."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.started = 0.0
        self.prefilled = 0.0
        self.first_token = 0.0
        self.last_token = 0.0
        self.ended = 0.0

    def timings(self, prompt_tokens: int, completion_tokens: int) -> Timings:
        end = self.ended or time.perf_counter()
        prefill = self.prefilled - self.started if self.prefilled else 0.0
        decode = self.last_token - self.first_token
        return Timings(
            queued=(self.started or end) - self.submitted,
            prefill=prefill,
            time_to_first_token=self.first_token - self.submitted if self.first_token else 0.0,
            decode=decode,
            total=end - self.submitted,
            prompt_tokens_per_second=prompt_tokens / prefill if prefill else 0.0,
            tokens_per_second=(completion_tokens - 1) / decode if decode else 0.0,
        )
