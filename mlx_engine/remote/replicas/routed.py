"""A request to a manager: it goes to a replica, and to another one if that ends under it."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from mlx_engine.core.lifecycle import Lifecycle
from mlx_engine.core.stream import Emit, Producer
from mlx_engine.errors import EngineBusy, EngineDead, EngineNotRunning, for_good
from mlx_engine.outputs import (
    GenerationChunk,
    GenerationResult,
    ProgressCallback,
)
from mlx_engine.questions import PromptFacts, PromptQuestion
from mlx_engine.remote.linked import LinkedEngine
from mlx_engine.remote.remote_request import NOTHING
from mlx_engine.remote.replicas.abortable_work import AbortableWork
from mlx_engine.remote.replicas.replica_set import NoneUp, ReplicaSet
from mlx_engine.remote.replicas.routing import RequestCost
from mlx_engine.requests import GenerationRequest

T = TypeVar("T")

MAX_DEATHS = 2  # replicas that end under a request before it counts as the cause of that
MAX_ATTEMPTS = 3  # with those that were stopped by somebody else


class RoutedRequest:
    """A request at work on whatever replica; a ``Producer``.

    While no replica is up it waits for one, as far as the manager's waiting room allows. If its
    replica ends before anything of the answer has been given to the caller, it is done again on
    another one, from the beginning: ``on_progress`` is then told of a second prefill, and its
    ``timeout`` counts anew. After ``MAX_DEATHS`` it gets its ``EngineDead``, since it may be what
    kills them. A replica that is busy is passed over. ``max_wait`` is of all of its waiting: for
    a replica, and at those that were busy.
    """

    def __init__(
        self,
        request_id: str,
        request: GenerationRequest,
        on_progress: ProgressCallback | None,
        lifecycle: Lifecycle,
        replicas: ReplicaSet,
        check_running: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self._request = request
        self._on_progress = on_progress
        self._lifecycle = lifecycle
        self._replicas = replicas
        self._check_running = check_running
        self._producer: Producer | None = None  # of the latest attempt
        self._emitted = False
        self._cancelled = False

    async def run(self, emit: Emit | None) -> GenerationResult:
        """See ``Producer``."""
        self._check_running()
        with AbortableWork(self.request_id, self._lifecycle, self._replicas.leftovers) as work:
            return await attempted(
                RequestCost.of(self._request),
                work,
                self._replicas,
                functools.partial(self._attempt, work, emit),
                lambda: self._emitted or self._cancelled,
                self._request.max_wait,
            )

    def cancel(self) -> None:
        """See ``Producer``."""
        self._cancelled = True
        if (producer := self._producer) is not None:
            producer.cancel()

    def partial_result(self) -> GenerationResult:
        """See ``Producer``."""
        producer = self._producer
        if producer is None:
            return replace(NOTHING, request_id=self.request_id)
        return producer.partial_result()

    async def _attempt(
        self, work: AbortableWork, emit: Emit | None, engine: LinkedEngine, waited: float
    ) -> GenerationResult:
        def tell(chunk: GenerationChunk) -> None:
            if emit is not None and not work.over:
                self._emitted = True
                emit(chunk)

        request = self._request
        if request.max_wait is not None:
            request = replace(request, max_wait=max(0.0, request.max_wait - waited))
        producer = self._producer = engine.submit(request, self._on_progress, self.request_id)
        if self._cancelled:
            producer.cancel()

        async def run() -> GenerationResult:
            return await producer.run(None if emit is None else tell)

        return await work.do(run())


async def answered(
    question: PromptQuestion, work: AbortableWork, replicas: ReplicaSet
) -> PromptFacts:
    """The answer of any replica to a question; raises as ``attempted`` does."""
    # No replica is chosen for the beginning of a prompt that it does not prefill.
    return await attempted(
        RequestCost(0, 0), work, replicas, lambda engine, _: work.do(engine.answer(question))
    )


async def attempted(
    cost: RequestCost,
    work: AbortableWork,
    replicas: ReplicaSet,
    attempt: Callable[[LinkedEngine, float], Awaitable[T]],
    is_last: Callable[[], bool] = lambda: False,
    max_wait: float | None = None,
) -> T:
    """Result of an attempt at a replica; another one is asked if it is busy, or ends under it.

    Args:
        cost: of the request.
        work: that this is a part of.
        replicas: that may be asked.
        attempt: asks one, told for how many seconds it has waited by then.
        is_last: whether there must be no other attempt.
        max_wait: seconds that it may wait.

    Raises:
        EngineBusy: all are.
        EngineDead: so many have ended that it may be what kills them.
        MLXEngineError: the replica's own error.
    """
    busy: dict[str, EngineBusy] = {}
    attempts = deaths = 0
    waited, none_up = 0.0, False
    while True:
        began = time.monotonic()
        if none_up:
            await work.do(replicas.until_up(waited, max_wait))
            waited += time.monotonic() - began
            none_up = False
            began = time.monotonic()
        try:
            with replicas.assigned(cost, busy) as (name, engine):
                return await attempt(engine, waited)
        except NoneUp:
            if busy and replicas.up():
                raise min(busy.values(), key=lambda error: error.retry_after) from None
            busy.clear()
            none_up = True
        except EngineBusy as error:
            busy[name] = error
            waited += time.monotonic() - began
        except EngineNotRunning as error:
            if work.aborted:
                raise
            replicas.ended(name, engine)
            attempts += 1
            if isinstance(error, EngineDead):
                deaths += 1
                engine.kill()  # if there is anything left of it: its exit has to follow
            if deaths == MAX_DEATHS:  # this request may be what kills them
                raise for_good(_as_dead(error, name)) from error.__cause__
            if attempts == MAX_ATTEMPTS or is_last():
                raise _as_dead(error, name) from error.__cause__


def _as_dead(error: EngineNotRunning, name: str) -> EngineDead:
    """The error of a replica as the manager's, which itself has not been stopped."""
    if isinstance(error, EngineDead):
        return error
    return EngineDead(f"{name} was stopped by somebody else: {error}")
