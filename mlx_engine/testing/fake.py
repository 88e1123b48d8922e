"""``FakeEngine``: an engine without a model, for the tests of applications."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from mlx_engine.config import EngineConfig
from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.scheduler import BatchScheduler, Scheduler, SimpleScheduler
from mlx_engine.engine.base import checked_callback
from mlx_engine.engine.in_process import InProcessEngine
from mlx_engine.errors import EngineDead, InvalidRequest
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import ProgressCallback
from mlx_engine.requests import GenerationRequest, checked_priority
from mlx_engine.strategies import EngineDefault, SpecPrefill, Strategies
from mlx_engine.testing.fake_answer import Answers
from mlx_engine.testing.fake_model import FakeModel, Load
from mlx_engine.testing.fake_request import FakeRequest
from mlx_engine.testing.player import Player
from mlx_engine.testing.scripted_request import ScriptedRequest


class FakeEngine(InProcessEngine):
    """An engine that says what your test tells it to. It needs no MLX, and no Apple machine.

        async def test_greets() -> None:
            async with FakeEngine("Hello there!") as engine:
                assert await my_app(engine).greet("Ann") == "Hello there!"
            assert engine.requests[0].prompt == "Greet Ann."
            assert engine.requests[0].outcome == "finished"

    The queue, the states, shutdown, streams, errors and cancellation are those of
    ``SimpleEngine`` or, with a ``max_batch_size``, of ``BatchedEngine``: the same code, on
    the same thread. Only the model is made up.

    A piece of an answer is a token, and a chunk of a stream; at the end comes a token without
    text. ``max_tokens``, ``stop``, ``stop_token_ids``, ``ignore_eos`` (the answer begins again),
    ``logprobs`` (all 0, what is scripted is certain), ``max_reasoning_tokens`` and
    ``context_length`` are honoured, and tokens of earlier prompts and answers are counted as
    cached. Messages and tools are checked as those of other engines are; calls and reasoning come
    as deltas and segments, as from them; a script that no model could follow, such as a call
    without tools, or an answer that breaks the request's ``constraint`` or ``output``, fails its
    request (``GenerationError``). What else changes how tokens
    are chosen (temperature, penalties, ``logit_bias``, ``seed``, ...) has no effect;
    ``logits_processors`` and ``prefill=SpecPrefill(...)`` are refused.

    Attributes:
        requests: what it was asked, in order; those that it refused included.
    """

    _holder: FakeModel

    def __init__(
        self,
        answers: Answers = "Hello!",
        *,
        max_batch_size: int | None = None,
        seconds_per_token: float = 0.0,
        prefill_seconds: float = 0.0,
        load_seconds: float = 0.0,
        load: Load = (),
        model: str = "fake",
        supports_tools: bool = True,
        supports_reasoning: bool = True,
        context_length: int | None = None,
        queue_limit: int | None = None,
        max_wait: float | None = None,
        memory: int | float | Literal["auto"] = "auto",
        limits: RequestLimits = DEFAULT_LIMITS,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Make an engine; it can be asked once it is started.

        Args:
            answers: the answer to everything: text, a list of pieces (strings, ``Gate``,
                exceptions), or a ``FakeAnswer``. Or a mapping from prompts (from the text of the
                last message, in a chat) to answers; an iterator, each request taking the next
                one of it; or a function that is given a ``FakeRequest``, on the engine's thread.
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
        self.requests: list[FakeRequest] = []
        batch = {} if max_batch_size is None else {"max_batch_size": max_batch_size}
        queue = {"queue_limit": queue_limit, "max_wait": max_wait, "limits": limits}
        config = EngineConfig.of(
            "batched" if batch else "simple",
            model,
            {"context_length": context_length, "memory": memory, **queue, **batch},
        )
        self.limits = config.limits
        self.takes_priority = bool(batch)
        self._max_batch_size = config.batch.max_batch_size if batch else None
        self._on_progress = checked_callback(on_progress)
        holder = FakeModel(
            answers,
            load,
            config.model.context_length,
            seconds_per_token=seconds_per_token,
            prefill_seconds=prefill_seconds,
            load_seconds=load_seconds,
            supports_tools=supports_tools,
            supports_reasoning=supports_reasoning,
            memory=config.model.memory,
        )
        super().__init__(holder, config.queue, config.model.model)

    def _new_scheduler(self) -> Scheduler[ScriptedRequest]:
        lifecycle, queue, prepare = self._lifecycle, self.queue_limits, self._holder.prepare
        player = Player(self._holder, lifecycle.fail)
        if self._max_batch_size is None:
            return SimpleScheduler(lifecycle, queue, prepare, player.play)
        return BatchScheduler(lifecycle, queue, prepare, self._max_batch_size, player.run_batch)

    def die(self, error: EngineDead | None = None) -> None:
        """End the engine as if what it runs on were gone. From any thread.

        It is ``FAILED``, and whoever waits for it gets ``EngineDead`` at the next token; after
        a ``stop`` it can be started again. To let it die in the middle of an answer, put an
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
