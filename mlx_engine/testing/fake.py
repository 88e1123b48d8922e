"""``FakeEngine``: an engine without a model, for the tests of applications."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_engine.config import EngineConfig
from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.in_flight import RequestTicket
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.preparer import Preparer
from mlx_engine.core.scheduler import BatchScheduler
from mlx_engine.core.stream import Emit
from mlx_engine.engine.base import BaseEngine, checked_callback
from mlx_engine.engine.bursts import BurstLife
from mlx_engine.engine.producer import RequestProducer
from mlx_engine.errors import EngineDead, InvalidRequest, MLXEngineError, describe
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.requests import GenerationRequest, checked_priority
from mlx_engine.strategies import EngineDefault, SpecPrefill, Strategies
from mlx_engine.testing.fake_answer import Answers, another
from mlx_engine.testing.fake_model import LOOK, FakeModel, Load
from mlx_engine.testing.fake_request import FakeRequest, Outlet


class FakeEngine(BurstLife[FakeRequest], BaseEngine):
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
    ``logprobs`` (all 0, what is scripted is certain) and ``context_length`` are honoured, and
    tokens of earlier prompts and answers are counted as cached. What else changes how tokens
    are chosen (temperature, penalties, ``logit_bias``, ``seed``, ...) has no effect;
    ``logits_processors`` and ``prefill=SpecPrefill(...)`` are refused.

    Attributes:
        requests: what it was asked, in order; those that it refused included.
    """

    _slot: FakeModel

    def __init__(
        self,
        answers: Answers = "Hello!",
        *,
        max_batch_size: int | None = None,
        seconds_per_token: float = 0.0,
        prefill_seconds: float = 0.0,
        load_seconds: float = 0.0,
        load: Load = (),
        context_length: int | None = None,
        queue_limit: int | None = None,
        max_wait: float | None = None,
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
            context_length: tokens that prompt and answer may have together.
            queue_limit: requests that may wait for their turn before ``EngineBusy`` is raised.
            max_wait: seconds that a request may wait for its turn before ``EngineBusy`` is raised.
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
            "fake",
            {"context_length": context_length, **queue, **batch},
        )
        self._limits, self._queue = config.limits, config.queue
        self._batched = self._takes_priority = bool(batch)
        self._seats: BatchScheduler[FakeRequest] = BatchScheduler(
            config.batch.max_batch_size if batch else 1
        )
        self._playing: dict[FakeRequest, Iterator[float | None]] = {}
        self._on_progress = checked_callback(on_progress)
        model = FakeModel(
            answers,
            load,
            config.model.context_length,
            seconds_per_token=seconds_per_token,
            prefill_seconds=prefill_seconds,
            load_seconds=load_seconds,
        )
        super().__init__(model, self._queue)
        if self._batched:
            self._preparer = Preparer(self._seats)

    def die(self, error: EngineDead | None = None) -> None:
        """End the engine as if what it runs on were gone. From any thread.

        It is ``FAILED``, and whoever waits for it gets ``EngineDead`` at the next token; after
        a ``stop`` it can be started again. To let it die in the middle of an answer, put an
        ``EngineDead`` among the pieces.

        Args:
            error: what everybody is told.
        """
        dead = self._slot.dead = error or EngineDead("the engine was told to die")
        self._lifecycle.fail(lambda: another(dead))

    async def _load_model(self, stop: threading.Event, should_stop: Callable[[], bool]) -> None:
        progress = in_this_loop(self._on_progress)
        await self._run_blocking_serialized(
            self._slot.fill, progress, should_stop, on_cancel=stop.set
        )

    async def _save_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("save"), reported=False)
        return await self._run_blocking_serialized(
            lambda: self._slot.cache.save(path), _ticket=ticket
        )

    async def _load_prompt_cache(self, path: Path) -> int:
        ticket = RequestTicket(self._lifecycle.new_id("load"), reported=False)
        return await self._run_blocking_serialized(
            lambda: self._slot.cache.load(path), _ticket=ticket
        )

    def _check_strategies(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> None:
        Strategies().of_request(prefill, decode)

    @property
    def _width(self) -> int:
        return self._seats.width

    def _producer(
        self,
        ask: GenerationRequest,
        on_progress: ProgressCallback | None,
        request_id: str | None = None,
    ) -> RequestProducer:
        self._check_strategies(ask.prefill, ask.decode)
        checked_priority(ask.priority, self._takes_priority)
        if ask.params.logits_processors:
            raise InvalidRequest(
                "logits_processors", "what a FakeEngine says is scripted: it has no logits"
            )
        request = FakeRequest(ask, request_id or self._lifecycle.new_id(), on_progress)
        return RequestProducer(request, functools.partial(self._complete, request))

    async def _complete(self, request: FakeRequest, emit: Emit | None) -> GenerationResult:
        outlet = Outlet(emit)  # of this coroutine: the engine keeps its requests for ever
        request.submitted(outlet)
        self.requests.append(request)
        ticket = RequestTicket(request.request_id)
        try:
            serve = self._serve if self._batched else self._serve_alone
            result = await serve(request, ticket)
        except asyncio.CancelledError:
            request.over("cancelled")
            raise
        except BaseException as error:
            request.over("failed", error)
            raise
        request.over("cancelled" if result.finish_reason == "cancelled" else "finished")
        return result

    async def _serve_alone(self, request: FakeRequest, ticket: RequestTicket) -> GenerationResult:
        return await self._run_blocking_serialized(
            self._play_alone,
            request,
            on_cancel=request.cancel,
            _ticket=ticket,
            _prepare=functools.partial(self._prepare, request),
        )

    def _prepare(self, request: FakeRequest) -> MLXEngineError | None:
        try:
            request.prepare(self._slot.context_length)
        except Exception as error:  # noqa: BLE001 - told to its caller
            return request.failed(error)
        return None

    # on the MLX thread

    def _play_alone(self, request: FakeRequest) -> GenerationResult:
        try:
            for seconds in self._slot.play(request):
                time.sleep(LOOK if seconds is None else seconds)
        except EngineDead as error:
            self.die(error)
            raise
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - told to its caller
            failed = request.failed(error)
            raise failed from failed.__cause__
        return request.result()

    def _burst(self, stop: threading.Event) -> None:
        try:
            while self._take_up() and not stop.is_set():
                self._step()
                if mlx_thread.wanted:
                    return
        except BaseException as error:  # noqa: BLE001 - nobody may be left waiting
            dead = error if isinstance(error, EngineDead) else EngineDead(describe(error))
            self._playing.clear()
            self.die(dead)
            self._seats.end_all(dead)

    def _take_up(self) -> bool:
        """Give places to those whose turn it is; whether there is anything to do."""
        while (seat := self._seats.first()) is not None:
            if seat.orphaned:
                self._seats.withdraw_orphans()
            elif self._seats.take(seat):
                self._playing[seat.request] = self._slot.play(seat.request)
        return self._seats.pending

    def _step(self) -> None:
        """A token for each request that is not held at a gate."""
        self._slot.meter.batch_size = len(self._playing)
        waits = []
        for request, steps in list(self._playing.items()):
            error = None
            try:
                waits.append(next(steps))
                continue
            except StopIteration:
                pass
            except EngineDead:
                raise
            except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - told to its caller
                error = request.failed(raised)
            del self._playing[request]
            self._seats.end(request, error)
        self._slot.meter.batch_size = len(self._playing)
        if waits:
            time.sleep(max((s for s in waits if s is not None), default=LOOK))
