"""Many requests by one call: where their items come from, and how each comes to its outcome."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from typing import Any, TypeVar

from mlx_engine.checks import flag, integer
from mlx_engine.config import QueueConfig
from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.log import LOG
from mlx_engine.engine.items import check_items, check_not_one_chat, taker
from mlx_engine.engine.outcome import Job, LastOutcome, Outcome
from mlx_engine.engine.outcomes import Do, Outcomes, Take
from mlx_engine.errors import (
    EngineBusy,
    EngineDead,
    EngineNotRunning,
    InvalidRequest,
    MLXEngineError,
    another,
)
from mlx_engine.outputs import (
    EngineState,
    GenerationResult,
    Progress,
    ProgressCallback,
)
from mlx_engine.params import SamplingParams

K = TypeVar("K")

_AHEAD = 4  # for so many that can be in work at once one more waits, and one in any case
_SHORTEST, _LONGEST = 0.01, 1.0  # seconds to wait where the queue is full of others' requests
_LONG = 5.0  # seconds of that, after which it is said
_FIRST, _LAST = 0.5, 30.0  # seconds before the first retry; each of the next waits twice as long
_AT_ONCE = 32  # parameters made before the event loop may do something else

# Makes the answer to an item, which may wait in the queue for so many seconds.
Ask = Callable[[Any, float | None], Awaitable[GenerationResult]]


def mapped(
    prompts: Any,
    ask: Ask,
    engine: Any,
    *,
    concurrency: int | None,
    ordered: bool = False,
    retries: int = 0,
    max_wait: float | None = None,
    on_progress: ProgressCallback | None = None,
) -> Outcomes[Any]:
    """Outcomes of what is asked with each of ``prompts``.

    Args:
        prompts: items, or pairs of id and item; or a mapping of these.
        ask: makes the answer to an item.
        engine: its state is looked at, and it is restarted before a retry, if it is dead.
        concurrency: items under way at a time; ``None`` is as many as keep the engine busy.
        max_wait: seconds for which each may wait for its turn; ``None`` is no limit.
        on_progress: told in the event loop how many are over.

    Raises:
        InvalidRequest: an argument is not acceptable.
    """
    check_items(prompts)
    total = len(prompts) if isinstance(prompts, Sized) else None
    if concurrency is None:
        limits = getattr(engine, "queue_limits", QueueConfig())
        places = at_once(engine.width, limits, max_wait)
    else:
        places = integer("concurrency", concurrency, low=1)
    work = _Jobs(ask, engine, integer("retries", retries, low=0), max_wait)

    def begin() -> tuple[Take[Any], Do[Any], Callable[[], None]]:
        return taker(prompts), work.outcome, _teller(on_progress, total)

    workers = places if total is None else min(places, total)
    return Outcomes(begin, workers, ordered=flag("ordered", ordered), total=total)


class _Jobs:
    """Jobs of one call, each of which comes to its outcome."""

    def __init__(self, ask: Ask, engine: Any, retries: int, max_wait: float | None) -> None:
        self._ask = ask
        self._engine = engine
        self._retries = retries
        self._max_wait = max_wait
        self._ended = asyncio.Event()  # one of these, which makes room
        self._warned = False

    async def outcome(self, job: Job[K]) -> Outcome[K]:
        """Make attempts until there is an answer, or an error for which no other one is due.

        Raises:
            LastOutcome: the engine takes no requests any more.
        """
        for attempt in range(1, self._retries + 2):
            try:
                result = await self._attempt(job)
                return Outcome(job.id, job.index, result, None, attempt)
            except MLXEngineError as error:
                again = error.retryable and attempt <= self._retries
                if not again or not await self._recovered(error, attempt):
                    return self._failed(Outcome(job.id, job.index, None, error, attempt))
            finally:
                self._ended.set()
        raise AssertionError("the last attempt returns")

    async def _attempt(self, job: Job[Any]) -> GenerationResult:
        """The answer to an item, once there is a place for it: that the queue is full of others'
        requests is no failure of this one.
        """
        began = time.monotonic()
        left = self._max_wait
        while True:
            try:
                return await self._ask(job.item, left)
            except EngineBusy as busy:
                waited = time.monotonic() - began
                if self._max_wait is not None:
                    left = self._max_wait - waited
                    if left <= 0:
                        raise
                self._warn(waited, busy)
                self._ended.clear()
                with contextlib.suppress(TimeoutError):
                    pause = min(max(busy.retry_after, _SHORTEST), _LONGEST)
                    async with asyncio.timeout(pause if left is None else min(pause, left)):
                        await self._ended.wait()

    def _warn(self, waited: float, busy: EngineBusy) -> None:
        """Say once that somebody waits for long, who may not have meant to."""
        if waited >= _LONG and not self._warned:
            self._warned = True
            LOG.warning("map waits, for %.0f s by now (max_wait bounds that): %s", waited, busy)

    async def _recovered(self, error: MLXEngineError, attempt: int) -> bool:
        """Wait before the next attempt, and bring the engine back if it is gone; whether it is."""
        pause = min(_LAST, _FIRST * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        if isinstance(error, EngineBusy):
            pause = max(pause, error.retry_after)
        if isinstance(error, EngineDead):
            try:
                await self._engine.restart()
            except (MLXEngineError, RuntimeError):  # the outcome has the error that came first
                return False
        await asyncio.sleep(pause)
        return True

    def _failed(self, outcome: Outcome[K]) -> Outcome[K]:
        error = outcome.error
        over = isinstance(error, EngineNotRunning)
        if over and self._engine.state is not EngineState.RUNNING:
            assert error is not None
            raise LastOutcome(outcome, error)
        return outcome


def _teller(on_progress: ProgressCallback | None, total: int | None) -> Callable[[], None]:
    tell, done = in_this_loop(on_progress), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if tell is not None:
            tell(Progress("batch", done, total))

    return one_more


def at_once(width: int, queue: QueueConfig, max_wait: float | None = None) -> int:
    """How many requests of a list to make at a time: some wait, so that one can follow at once
    where one ends, unless waiting is what the queue, or the caller, does not allow.

    Args:
        width: how many can be in work.
        max_wait: the caller's.
    """
    ahead = width // _AHEAD + 1
    if queue.max_wait is not None or max_wait is not None:
        return width
    return width + (ahead if queue.queue_limit is None else min(ahead, queue.queue_limit))


async def made_once(
    given: Sequence[SamplingParams | None], make: Callable[[SamplingParams | None], SamplingParams]
) -> list[SamplingParams]:
    """Results of ``make`` for each, once for the same one, without holding up the event loop."""
    made: dict[int, SamplingParams] = {}
    for own in given:
        if id(own) not in made:
            made[id(own)] = make(own)
            if len(made) % _AT_ONCE == 0:
                await asyncio.sleep(0)
    return [made[id(own)] for own in given]


def params_for_each(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams | None] | None
) -> list[SamplingParams | None]:
    """The parameters of each prompt, if both are what they should be.

    Raises:
        InvalidRequest: one of them is not.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence):
        raise InvalidRequest(
            "prompts", f"must be a list of prompts, not {type(prompts).__name__}; see generate()"
        )
    check_not_one_chat(prompts)
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Sequence):
        raise InvalidRequest(
            "params", f"must be a SamplingParams or a list of them, not {type(params).__name__}"
        )
    if len(params) != len(prompts):
        raise InvalidRequest(
            "params",
            f"there are {len(params)} for {len(prompts)} prompts; give one, or one for each",
        )
    return list(params)


async def in_order(outcomes: Outcomes[Any], count: int) -> list[GenerationResult | MLXEngineError]:
    """Results or errors of ``count`` items, in their order; those that the end of the engine has
    kept from being taken up have its error.
    """
    ends: dict[int, GenerationResult | MLXEngineError] = {}
    gone: MLXEngineError | None = None
    async with outcomes:
        try:
            async for outcome in outcomes:
                ends[outcome.index] = outcome.error or outcome.unwrap()
        except MLXEngineError as error:
            gone = error.with_traceback(None)
    if gone is not None:
        for index in set(range(count)) - ends.keys():
            ends[index] = another(gone)
    return [ends[index] for index in range(count)]
