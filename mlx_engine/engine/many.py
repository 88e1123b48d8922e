"""Many requests by one call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from mlx_engine.config import QueueConfig
from mlx_engine.core.bridge import in_this_loop
from mlx_engine.core.drain import wait_shielded
from mlx_engine.errors import EngineBusy, InvalidRequest, MLXEngineError
from mlx_engine.outputs import Progress, ProgressCallback
from mlx_engine.params import SamplingParams

T = TypeVar("T")


_AHEAD = 4  # for so many that can be in work at once one more waits, and one in any case
_SHORTEST, _LONGEST = 0.01, 1.0  # seconds to wait where the queue is full of others' requests
_AT_ONCE = 32  # parameters made before the event loop may do something else


async def in_order(
    calls: Sequence[Callable[[], Awaitable[T]]],
    at_once: int,
    on_progress: ProgressCallback | None,
) -> list[T | MLXEngineError]:
    """Make all calls, ``at_once`` of them at a time; each gives its result, or the error it
    failed with. One that finds no place is made again.

    Args:
        on_progress: told in this event loop, after each call, how many are over.

    Cancellation: the calls under way are cancelled, ``CancelledError`` is raised when all of
    them are over.
    """
    results: list[T | MLXEngineError | None] = [None] * len(calls)
    tell = in_this_loop(on_progress)
    left = iter(enumerate(calls))
    done = 0
    ended = asyncio.Event()

    async def outcome(call: Callable[[], Awaitable[T]]) -> T | MLXEngineError:
        while True:
            try:
                return await call()
            except EngineBusy as busy:
                ended.clear()  # one of ours, which makes room
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(max(busy.retry_after, _SHORTEST), _LONGEST)):
                        await ended.wait()
            except MLXEngineError as error:
                return error

    async def work() -> None:
        nonlocal done
        for index, call in left:
            results[index] = await outcome(call)
            ended.set()
            done += 1
            if tell is not None:
                tell(Progress("batch", done, len(calls)))

    workers = [asyncio.create_task(work()) for _ in range(min(at_once, len(calls)))]

    def cancel() -> None:
        for worker in workers:
            worker.cancel()

    ends = asyncio.gather(*workers, return_exceptions=True)
    await wait_shielded(ends, cancel)
    for end in ends.result():
        if end is not None:  # not ours: a bug, or somebody has cancelled all tasks
            raise end
    return [result for result in results if result is not None]


def at_once(width: int, queue: QueueConfig) -> int:
    """How many requests of a list to make at a time: some wait, so that one can follow at once
    where one ends, unless waiting is what the queue does not allow.

    Args:
        width: how many can be in work.
    """
    ahead = width // _AHEAD + 1
    if queue.max_wait is not None:
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
