"""A request at work in a ``FakeEngine``."""

from __future__ import annotations

import asyncio
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mlx_engine.core.request import ActiveRequest, Serve, final_reason
from mlx_engine.core.stream import Emit, Piece, emit_pieces
from mlx_engine.errors import drop_frames
from mlx_engine.outputs import (
    FinishReason,
    GenerationResult,
    ProgressCallback,
    Segment,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_engine.requests import GenerationRequest
from mlx_engine.testing.fake_call import CallPiece
from mlx_engine.testing.fake_prompt import encode
from mlx_engine.testing.fake_request import FakeRequest
from mlx_engine.testing.fake_text import FakeText
from mlx_engine.testing.fake_tokens import END, TokenTexts
from mlx_engine.testing.script_error import ScriptError


class ScriptedRequest(ActiveRequest):
    """A request whose tokens come from a script.

    Args:
        asked, request_id, on_progress, serve: those of every ``ActiveRequest``.
        seen: gets what the test is shown of it, once it is run.
        texts: of tokens.

    Attributes:
        shown: that.
    """

    def __init__(
        self,
        asked: GenerationRequest,
        request_id: str,
        on_progress: ProgressCallback | None,
        serve: Serve,
        seen: list[FakeRequest],
        texts: TokenTexts,
    ) -> None:
        super().__init__(asked, request_id, on_progress, serve)
        self._seen = seen
        self._text = FakeText(tuple(self._params.stop))
        self._texts = texts
        self._calls: list[ToolCall] = []
        self._open: ToolCall | None = None  # a call that has begun, as far as it was made
        self._reasoning_tokens = 0
        # The engine keeps what it shows for ever, and must keep nothing of the caller with it.
        self.shown = FakeRequest(asked, request_id, self.result(), _weakly(self))

    def run(self, emit: Emit | None) -> Awaitable[GenerationResult]:
        """Begin it, for a caller who waits in this event loop; see ``Producer``."""
        self._seen.append(self.shown)
        return self._until_known(super().run(emit))

    async def _until_known(self, work: Awaitable[GenerationResult]) -> GenerationResult:
        """Its outcome is told as soon as its caller knows."""
        shown = self.shown
        try:
            result = await work
        except asyncio.CancelledError:
            shown.outcome = "cancelled"
            raise
        except BaseException as error:
            shown.outcome = "failed" if shown.outcome == "running" else "refused"
            shown.error = error
            raise
        finally:
            shown._end(self.result())
        shown.outcome = "cancelled" if result.finish_reason == "cancelled" else "finished"
        return result

    def prepare(self, context_length: int | None) -> None:
        """Count the tokens of the prompt. On any thread.

        Raises:
            ContextLengthExceeded: there is no room for the answer.
        """
        self.prompt = self.shown.prompt_tokens = encode(self.asked.source, self._texts)
        self.fit(context_length)

    def broken(self, error: BaseException) -> Exception:
        """End it; the error that its caller gets: ``failed``, or a mistake of the script."""
        if not isinstance(error, ScriptError):
            return self.failed(error)
        self._timer.ended = time.perf_counter()
        if error.__cause__ is not None:
            frames = traceback.format_exception(error.__cause__)
            error.add_note("".join(["On the engine's thread:\n", *frames]))
        drop_frames(error)
        return error

    def begin(self, cached_tokens: int) -> None:
        """Its work begins, behind so many tokens that need no prefill."""
        self.work_begins()
        self.shown.outcome = "running"
        self.prefill_begins(cached_tokens)

    def prefilled(self) -> None:
        """All of its prompt has been read."""
        super().prefilled()
        self.progress(len(self.prompt))

    @property
    def calls(self) -> int:
        """How many calls are complete."""
        return len(self._calls)

    @property
    def has_called_enough(self) -> bool:
        """Whether a call was made, and one is all that it asks for."""
        return not self.shown.parallel_tool_calls and any(call.ok for call in self._calls)

    @property
    def has_reasoned_enough(self) -> bool:
        """Whether its ``max_reasoning_tokens`` are used up."""
        most = self.shown.max_reasoning_tokens
        return most is not None and self._reasoning_tokens >= most

    def take(self, segment: Segment, text: str) -> bool:
        """Take the next token; whether the answer is complete with it."""
        self._reasoning_tokens += segment == "reasoning"
        token = self._texts.token(text)
        if token in self._params.stop_token_ids:
            self._finish("stop", token, [])
            return True
        pieces = self._text.add(segment, text)
        return self._took(token, pieces, "stop" if self._text.stopped else None)

    def take_call(self, piece: CallPiece) -> bool:
        """Take the next token, which is one of a tool call; see ``take``."""
        token = self._texts.token(piece.text)
        if token in self._params.stop_token_ids:
            self._finish("stop", token, [])
            return True
        pieces = self._text.add("tool_call", piece.text)
        delta, begun = piece.delta, self._open or ToolCall(id=piece.delta.id or "")
        if self._text.stopped:
            self._open, delta = begun, ToolCallDelta(delta.index, delta.id)
        else:
            name = begun.name or delta.name or ""
            self._open = replace(begun, name=name, raw=begun.raw + piece.text)
        if piece.call is not None and not self._text.stopped:
            self._calls.append(piece.call)
            self._open = None
        if pieces and pieces[-1].segment == "tool_call":
            pieces[-1] = pieces[-1]._replace(call=delta)
        else:
            pieces.append(Piece("tool_call", "", delta))
        return self._took(token, pieces, "stop" if self._text.stopped else None)

    def take_end(self) -> bool:
        """Take the end of the sequence; whether the answer is complete with it."""
        params = self._params
        stops = not params.ignore_eos or END in params.stop_token_ids or params.constraint
        return self._took(END, [], "stop" if stops else None)

    def end(self, reason: FinishReason) -> None:
        """End it here, without another token."""
        self._finish(reason, None, [])

    def result(self) -> GenerationResult:
        """Result so far; final once it is over."""
        tokens = tuple(self._tokens)
        return GenerationResult(
            text=self._text.so_far("content"),
            tokens=tokens,
            finish_reason=self._finish_reason,
            usage=Usage(len(self.prompt), len(tokens), self._cached_tokens),
            timings=self._timer.timings(len(self.prompt) - self._cached_tokens, len(self._tokens)),
            reasoning=self._text.so_far("reasoning"),
            tool_calls=tuple(self._calls),
            logprobs=tuple(map(self._logprob, tokens)) if self.wants_logprobs else (),
            request_id=self.request_id,
            stop_string=self._text.stop_string,
        )

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer, for the prompt cache."""
        return self.prompt + [token for token in self._tokens if token != END]

    def _took(self, token: int, pieces: list[Piece], reason: FinishReason | None) -> bool:
        if reason is None and len(self._tokens) + 1 == self.limit:
            reason = "length"
        if reason is not None:
            self._finish(reason, token, pieces)
            return True
        self._keep(token)
        self._let_out(token, pieces, None)
        return False

    def _finish(self, reason: FinishReason, token: int | None, pieces: list[Piece]) -> None:
        if token is not None:
            self._keep(token)
        pieces = pieces + self._text.finish()
        if self._open is not None:
            error = "the call was cut off"
            pieces.append(Piece("tool_call", "", ToolCallDelta(self.calls, error=error)))
            self._calls.append(replace(self._open, error=error))
        reason = final_reason(reason, self._calls, by_string=self._text.stopped)
        self._finish_reason = reason
        self._timer.ended = time.perf_counter()
        self._let_out(token, pieces, reason)

    def _keep(self, token: int) -> None:
        self._timer.last_token = time.perf_counter()
        self._timer.first_token = self._timer.first_token or self._timer.last_token
        self._tokens.append(token)

    def _let_out(self, token: int | None, pieces: list[Piece], reason: FinishReason | None) -> None:
        if self._emit is None:
            return
        tokens = () if token is None else (token,)
        logprobs = tuple(map(self._logprob, tokens)) if self.wants_logprobs else ()
        emit_pieces(self._emit, list(map(self._with_delta, pieces)), tokens, logprobs, reason)

    def _with_delta(self, piece: Piece) -> Piece:
        """The piece; text of a call that was held back has a delta too, which adds nothing."""
        if piece.segment != "tool_call" or piece.call is not None:
            return piece
        index = self.calls if self._open is not None else self.calls - 1
        return piece._replace(call=ToolCallDelta(index))

    def _logprob(self, token: int) -> TokenLogprob:
        """Log-probability of a token: what is scripted is certain."""
        text = self._texts.text(token)
        own = TokenLogprob(token, 0.0, (), text, text.encode(errors="replace"))
        return replace(own, top=(own,)) if self._params.logprobs else own


def _weakly(request: ScriptedRequest) -> Callable[[], GenerationResult | None]:
    """Its result so far; ``None`` once there is no such request any more."""
    reference = weakref.ref(request)

    def result() -> GenerationResult | None:
        there = reference()
        return None if there is None else there.result()

    return result
