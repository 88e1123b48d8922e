"""What a ``FakeEngine`` was asked, and what became of it."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from typing import Any, Literal

from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.event_loop import running_loop
from mlx_engine.core.stream import Emit, emit_pieces
from mlx_engine.core.timer import RequestTimer
from mlx_engine.errors import (
    ContextLengthExceeded,
    GenerationError,
    MLXEngineError,
    describe,
    drop_frames,
)
from mlx_engine.outputs import (
    FinishReason,
    GenerationResult,
    Progress,
    ProgressCallback,
    Segment,
    TokenLogprob,
    ToolCall,
    Usage,
)
from mlx_engine.requests import ChatPrompt, GenerationRequest
from mlx_engine.testing.fake_text import FakeText
from mlx_engine.testing.fake_tokens import END, token_id, words

Outcome = Literal["waiting", "running", "finished", "cancelled", "failed"]


class Outlet:
    """Where the chunks of a request go. Its caller's coroutine has it, and it alone."""

    def __init__(self, emit: Emit | None) -> None:
        self.emit = emit


class FakeRequest:
    """A request that a ``FakeEngine`` got, for the assertions of a test.

    Attributes:
        request_id: the engine's name for it.
        prompt: text or token ids; ``None`` in a chat.
        messages: of a chat, with the text of each in one string; ``None`` otherwise.
        tools: of a chat; ``None`` if there are none.
        chat_template_kwargs: of a chat.
        params: sampling parameters.
        priority: of the caller's choice; lower goes first.
        outcome: what has become of it: ``waiting``, ``running``, ``finished``, ``cancelled`` or
            ``failed``. Right as soon as its caller knows.
        prompt_tokens: token ids that its prompt is counted as, once its turn has come.
        error: what its caller got, if it failed.
    """

    def __init__(
        self, ask: GenerationRequest, request_id: str, on_progress: ProgressCallback | None
    ) -> None:
        source = ask.source
        chat = source if isinstance(source, ChatPrompt) else None
        self.request_id = request_id
        self.prompt = None if isinstance(source, ChatPrompt) else source.prompt
        self.messages = None if chat is None else chat.messages
        self.tools = None if chat is None else chat.tools
        self.chat_template_kwargs: dict[str, Any] = {} if chat is None else chat.template_kwargs
        self.params = ask.params
        self.priority = ask.priority
        self.outcome: Outcome = "waiting"
        self.error: BaseException | None = None
        self.prompt_tokens: list[int] = []
        self._on_progress = on_progress
        self._outlet: weakref.ref[Outlet] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._limit = self.params.max_tokens
        self._text = FakeText(tuple(self.params.stop))
        self._tokens: list[int] = []
        self._calls: list[ToolCall] = []
        self._cached_tokens = 0
        self._finish_reason: FinishReason = "cancelled"
        self._clock = RequestTimer()

    def __repr__(self) -> str:
        return f"<FakeRequest {self.request_id} {self.question!r} {self.outcome}>"

    @property
    def question(self) -> str | tuple[int, ...]:
        """What answers are looked up by: the prompt, or the text of a chat's last message."""
        if self.messages is not None:
            return str(self.messages[-1].get("content") or "")
        assert self.prompt is not None
        return self.prompt if isinstance(self.prompt, str) else tuple(self.prompt)

    def result(self) -> GenerationResult:
        """What has been answered so far; final once it is over."""
        tokens = tuple(self._tokens)
        return GenerationResult(
            text=self._text.so_far("content"),
            tokens=tokens,
            finish_reason=self._finish_reason,
            usage=Usage(len(self.prompt_tokens), len(tokens), self._cached_tokens),
            timings=self._clock.timings(
                len(self.prompt_tokens) - self._cached_tokens, len(self._tokens)
            ),
            reasoning=self._text.so_far("reasoning"),
            tool_calls=tuple(self._calls),
            logprobs=tuple(map(self._logprob, tokens)) if self._wants_logprobs else (),
            request_id=self.request_id,
        )

    # what the engine does with it

    @property
    def should_stop(self) -> bool:
        """Whether it was cancelled, or its event loop closed, so that nobody waits for it."""
        return self._stopped or (self._loop is not None and self._loop.is_closed())

    def submitted(self, outlet: Outlet) -> None:
        """The caller, who has the outlet, waits from now on, in this event loop."""
        self._clock.submitted = time.perf_counter()
        self._loop = running_loop()
        self._on_progress = in_this_loop(self._on_progress)
        self._outlet = weakref.ref(outlet)

    def cancel(self) -> None:
        """Ask it to stop at its next token. From any thread."""
        self._stopped = True

    def over(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Its caller knows."""
        self.outcome, self.error = outcome, error
        self._outlet = self._on_progress = None

    def prepare(self, context_length: int | None) -> None:
        """Count the tokens of the prompt. On the engine's thread.

        Raises:
            ContextLengthExceeded: there is no room for the answer.
        """
        self.prompt_tokens = self._encode()
        if context_length is None:
            return
        wanted, length = self.params.max_tokens, len(self.prompt_tokens)
        room = context_length - length
        if room < (1 if wanted is None else wanted):
            raise ContextLengthExceeded(
                f"{length} prompt tokens and max_tokens={wanted} do not fit into the context of "
                f"{context_length} tokens (the engine's context_length)",
                prompt_tokens=length,
                max_tokens=wanted,
                context_length=context_length,
                option="prompt" if self.messages is None else "messages",
            )
        self._limit = room if wanted is None else wanted

    def begin(self, cached_tokens: int) -> None:
        """Its work begins, behind so many tokens that need no prefill."""
        self._clock.started = time.perf_counter()
        self.outcome = "running"
        self._cached_tokens = cached_tokens
        self._progress(cached_tokens)

    @property
    def wants_tokens(self) -> bool:
        """Whether there is to be an answer."""
        return self._limit != 0

    def prefilled(self) -> None:
        """All of its prompt has been read."""
        self._clock.prefilled = time.perf_counter()
        self._progress(len(self.prompt_tokens))

    def take(self, segment: Segment, piece: str | ToolCall) -> bool:
        """Take the next token; whether the answer is complete with it."""
        text = piece if isinstance(piece, str) else piece.raw
        token = token_id(text)
        if token in self.params.stop_token_ids:
            self._finish("stop", token, [])
            return True
        pieces = self._text.add(segment, text)
        if isinstance(piece, ToolCall) and not self._text.stopped:
            self._calls.append(piece)
        return self._took(token, pieces, "stop" if self._text.stopped else None)

    def take_end(self) -> bool:
        """Take the end of the sequence; whether the answer is complete with it."""
        stops = not self.params.ignore_eos or END in self.params.stop_token_ids
        return self._took(END, [], "stop" if stops else None)

    def end(self, reason: FinishReason) -> None:
        """It ends here, without another token."""
        self._finish(reason, None, [])

    def failed(self, error: BaseException) -> MLXEngineError:
        """It ends here; what its caller is told."""
        self._clock.ended = time.perf_counter()
        drop_frames(error)
        if isinstance(error, MLXEngineError):
            return error
        failed = GenerationError(f"{self.request_id} failed: {describe(error)}")
        failed.__cause__ = error
        return failed

    @property
    def seen(self) -> list[int]:
        """The tokens of the prompt and of the answer, for the prompt cache."""
        return self.prompt_tokens + [token for token in self._tokens if token != END]

    @property
    def _wants_logprobs(self) -> bool:
        return self.params.logprobs is not None

    def _took(
        self, token: int, pieces: list[tuple[Segment, str]], reason: FinishReason | None
    ) -> bool:
        if reason is None and len(self._tokens) + 1 == self._limit:
            reason = "length"
        if reason is not None:
            self._finish(reason, token, pieces)
            return True
        self._keep(token)
        self._let_out(token, pieces, None)
        return False

    def _finish(
        self, reason: FinishReason, token: int | None, pieces: list[tuple[Segment, str]]
    ) -> None:
        if token is not None:
            self._keep(token)
        self._finish_reason = reason
        self._clock.ended = time.perf_counter()
        self._let_out(token, pieces + self._text.finish(), reason)

    def _keep(self, token: int) -> None:
        self._clock.last_token = time.perf_counter()
        self._clock.first_token = self._clock.first_token or self._clock.last_token
        self._tokens.append(token)

    def _let_out(
        self, token: int | None, pieces: list[tuple[Segment, str]], reason: FinishReason | None
    ) -> None:
        outlet = None if self._outlet is None else self._outlet()
        if outlet is None or outlet.emit is None:
            return
        tokens = () if token is None else (token,)
        logprobs = tuple(map(self._logprob, tokens)) if self._wants_logprobs else ()
        emit_pieces(outlet.emit, pieces, tokens, logprobs, reason)

    def _logprob(self, token: int) -> TokenLogprob:
        """What is scripted is certain."""
        return TokenLogprob(token, 0.0, ((token, 0.0),) if self.params.logprobs else ())

    def _progress(self, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress("prefill", done, len(self.prompt_tokens)))

    def _encode(self) -> list[int]:
        """A word is a token; so are the role of each message, and all tools together."""
        if self.messages is None:
            assert self.prompt is not None
            given = self.prompt
            return [token_id(w) for w in words(given)] if isinstance(given, str) else list(given)
        parts = [] if self.tools is None else [json.dumps(self.tools, default=str)]
        for message in self.messages:
            parts += [message["role"], *words(str(message.get("content") or ""))]
            parts += [json.dumps(call, default=str) for call in message.get("tool_calls") or ()]
        return [token_id(part) for part in [*parts, "assistant"]]
