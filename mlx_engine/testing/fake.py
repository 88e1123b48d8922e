"""``FakeEngine``: an engine without a model, for the tests of applications."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from mlx_engine.config import EngineConfig
from mlx_engine.core.bridge import checked_callback, in_this_loop
from mlx_engine.core.scheduler import BatchScheduler, Scheduler, SimpleScheduler
from mlx_engine.engine.base import Work
from mlx_engine.engine.in_process import InProcessEngine
from mlx_engine.errors import EngineDead, InvalidRequest
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.params import SamplingParams
from mlx_engine.requests import (
    ChatRequestOptions,
    GenerationRequest,
    Message,
    RequestOptions,
    check_known,
    checked_priority,
)
from mlx_engine.signatures import spelled_out
from mlx_engine.strategies import EngineDefault, SpecPrefill, Strategies
from mlx_engine.testing.fake_answer import AnswerLike, Answers, Script
from mlx_engine.testing.fake_gate import engines
from mlx_engine.testing.fake_model import FakeModel
from mlx_engine.testing.fake_options import DEFAULTS, FakeOptions
from mlx_engine.testing.fake_request import FakeRequest
from mlx_engine.testing.player import Player
from mlx_engine.testing.script_error import ScriptError
from mlx_engine.testing.scripted_request import ScriptedRequest


class FakeEngine(InProcessEngine):
    """An engine that says what your test tells it to. It needs no MLX, and no Apple machine.

        async def test_greets() -> None:
            async with FakeEngine("Hello there!") as engine:
                assert await my_app(engine).greet("Ann") == "Hello there!"
            assert engine.requests[0].prompt == "Greet Ann."
            assert engine.requests[0].outcome == "finished"

    One answer for each request, in order, errors among them:

        FakeEngine.script("one", FakeAnswer("two", reasoning="Hm."), GenerationError("boom"))

    A list that is given to ``FakeEngine([...])`` itself is one answer, piece by piece.

    The queue, the states, shutdown, streams, errors and cancellation are those of
    ``SimpleEngine`` or, with a ``max_batch_size``, of ``BatchedEngine``: the same code, on
    the same thread. Only the model is made up.

    A piece of an answer is a token, and a chunk of a stream; at the end comes a token without
    text. ``max_tokens``, ``stop``, ``stop_token_ids``, ``ignore_eos`` (the answer begins again),
    ``logprobs`` (all 0, what is scripted is certain), ``max_reasoning_tokens`` and
    ``context_length`` are honoured, ``timeout`` and ``max_wait`` too, and tokens of earlier prompts
    and answers are counted as cached. Messages, tools and options are checked as those of other
    engines are; calls and reasoning come as deltas and segments, as from them. What else changes
    how tokens
    are chosen (temperature, penalties, ``logit_bias``, ``seed``, ...) has no effect;
    ``logits_processors`` and ``prefill=SpecPrefill(...)`` are refused.

    A mistake of the script is a ``ScriptError`` for its request, which is no ``MLXEngineError``
    that an application would do something about, and again for the end of ``async with``: more
    requests than answers, or fewer, with ``script``; a prompt that is unknown; a function that
    fails; an answer that no model could give, such as a call without tools, or one that breaks the
    request's ``constraint`` or ``output``.

    Attributes:
        requests: what it was asked, in order; those that it refused included. Each says how it
            has ended.
    """

    _holder: FakeModel

    @spelled_out(FakeOptions, DEFAULTS)
    def __init__(self, answers: Answers = "Hello!", **options: Unpack[FakeOptions]) -> None:
        """Make an engine; it can be asked once it is started.

        Args:
            answers: the answer to everything: text, a list of pieces (strings, ``Gate``,
                exceptions), or a ``FakeAnswer``. Or a mapping from prompts (from the text of the
                last message, in a chat) to answers; an iterator, each request taking the next
                one of it; or a function that is given a ``FakeRequest``, on the engine's thread,
                and gives an answer, or raises an ``MLXEngineError`` in its place.
            max_batch_size: requests in work at once, as in ``BatchedEngine``: each step gives
                all of them a token, but for those at a gate. ``None`` is one after another, as in
                ``SimpleEngine``.
            seconds_per_token: that each token takes.
            prefill_seconds: that each prompt takes before its first token.
            load_seconds: that each start takes.
            load: gates and exceptions, such as ``ModelLoadError``, that each start comes to; or
                an iterator, each start taking the next one of it.
            model: name of the model that it pretends to have.
            supports_tools: whether chats may have tools.
            supports_reasoning: whether answers may have reasoning.
            context_length: tokens that prompt and answer may have together.
            queue_limit: requests that may wait for their turn before ``EngineBusy`` is raised,
                and as many questions, such as ``count_tokens``.
            max_wait: seconds that a request, or a question, may wait before ``EngineBusy`` is
                raised.
            memory: what it may have in all, as in other engines; it needs none.
            limits: how large a request may be; see ``RequestLimits``.
            on_progress: told of the load, in the event loop that starts the engine.

        Raises:
            InvalidRequest: an argument is of the wrong type or out of its range.
        """
        check_known(options, FakeOptions)
        given: dict[str, Any] = {**DEFAULTS, **options}
        self.requests: list[FakeRequest] = []
        width = given["max_batch_size"]
        batch = {} if width is None else {"max_batch_size": width}
        named = ("context_length", "memory", "queue_limit", "max_wait", "limits")
        config = EngineConfig.of(
            "batched" if batch else "simple",
            given["model"],
            {**{name: given[name] for name in named}, **batch},
        )
        self.limits = config.limits
        self.takes_priority = bool(batch)
        self._max_batch_size = config.batch.max_batch_size if batch else None
        self._on_progress = checked_callback(given["on_progress"])
        own = config.model.context_length
        context_length = own if isinstance(own, int) else None
        holder = FakeModel(answers, context_length, config.model.memory, given)
        super().__init__(holder, config.queue, config.model.model)
        engines.add(self)

    @classmethod
    @spelled_out(FakeOptions, DEFAULTS)
    def script(cls, *answers: AnswerLike, **options: Unpack[FakeOptions]) -> Self:
        """An engine with one answer for each request, in the order in which their work begins.

        Args:
            answers: text, pieces, ``FakeAnswer``, or an exception, which the request raises.
            options: those of ``FakeEngine``.

        At the end of its ``async with``, and in ``check_script``, answers that were not asked for
        are a ``ScriptError``, as is a request for which there was none.
        """
        return cls(Script(answers), **options)

    @property
    def mistakes(self) -> Sequence[ScriptError]:
        """The mistakes of the script that have come up, until ``check_script``."""
        return tuple(self._holder.mistakes)

    def check_script(self) -> None:
        """See that its script was right, and of ``script(...)`` that all of it was used.

        ``async with`` does so at its end; this is for tests that start and stop the engine.

        Raises:
            ScriptError: it was not. What is told once is not told again.
        """
        self._holder.check_script()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await super().__aexit__(exc_type, exc, traceback)
        if exc is None:
            self.check_script()
        elif isinstance(exc, Exception) and not isinstance(exc, ScriptError):
            for error in self.mistakes:
                exc.add_note(f"before this there was a mistake of the script: {error}")

    def _text_work(
        self, prompt: object, params: SamplingParams | None, options: RequestOptions
    ) -> Work:
        try:
            return super()._text_work(prompt, params, options)
        except Exception as error:
            self.requests.append(FakeRequest.refused(error, params, options, prompt=prompt))
            raise

    def _chat_work(
        self,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        params: SamplingParams | None,
        options: ChatRequestOptions,
    ) -> Work:
        try:
            return super()._chat_work(messages, params, options)
        except Exception as error:
            self.requests.append(FakeRequest.refused(error, params, options, messages=messages))
            raise

    def _new_scheduler(self) -> Scheduler[ScriptedRequest]:
        lifecycle, queue, prepare = self._lifecycle, self.queue_limits, self._holder.prepare
        player = Player(self._holder, lifecycle.fail)
        if self._max_batch_size is None:
            return SimpleScheduler(lifecycle, queue, prepare, player.play)
        return BatchScheduler(lifecycle, queue, prepare, self._max_batch_size, player.run_batch)

    def die(self, error: EngineDead | None = None) -> None:
        """End the engine as if what it runs on were gone. From any thread.

        It is ``FAILED``, and whoever waits for it gets ``EngineDead`` at the next token;
        ``restart`` brings it back. To let it die in the middle of an answer, put an
        ``EngineDead`` among the pieces.

        Args:
            error: what everybody is told.
        """
        self._holder.die(error or EngineDead("the engine was told to die"), self._lifecycle.fail)

    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        progress = in_this_loop(self._on_progress)
        await self._run_blocking_serialized(
            self._holder.load, progress, should_stop, on_cancel=stop.set
        )

    def check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        Strategies().of_request(prefill, decode)

    def submit(
        self,
        request: GenerationRequest,
        on_progress: ProgressCallback | None = None,
        request_id: str | None = None,
    ) -> ScriptedRequest:
        self.check_strategies(request.prefill, request.decode)
        checked_priority(request.priority, self.takes_priority)
        if request.params.logits_processors:
            raise InvalidRequest(
                "logits_processors", "what a FakeEngine says is scripted: it has no logits"
            )
        name = request_id or self._lifecycle.new_id()
        return ScriptedRequest(
            request, name, on_progress, self._scheduler.serve, self.requests, self._holder.texts
        )
