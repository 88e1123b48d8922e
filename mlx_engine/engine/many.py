"""Many requests by one call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from mlx_engine.engine.crossing import in_this_loop
from mlx_engine.errors import InvalidRequest, MLXEngineError
from mlx_engine.outputs import Progress, ProgressCallback
from mlx_engine.params import SamplingParams
from mlx_engine.turn import outlast

T = TypeVar("T")


async def in_order(
    calls: Sequence[Callable[[], Awaitable[T]]],
    width: int,
    on_progress: ProgressCallback | None,
) -> list[T | MLXEngineError]:
    """Make all calls, ``width`` at a time; each gives its result, or the error it failed with.

    Args:
        on_progress: told in this event loop, after each call, how many are over.

    Cancellation: the calls under way are cancelled, ``CancelledError`` is raised when all of
    them are over.
    """
    results: list[T | MLXEngineError | None] = [None] * len(calls)
    tell = in_this_loop(on_progress)
    left = iter(enumerate(calls))
    done = 0

    async def work() -> None:
        nonlocal done
        for index, call in left:
            try:
                results[index] = await call()
            except MLXEngineError as error:
                results[index] = error
            done += 1
            if tell is not None:
                tell(Progress("batch", done, len(calls)))

    workers = [asyncio.create_task(work()) for _ in range(min(width, len(calls)))]

    def cancel() -> None:
        for worker in workers:
            worker.cancel()

    ends = asyncio.gather(*workers, return_exceptions=True)
    await outlast(ends, cancel)
    for end in ends.result():
        if end is not None:  # not ours: a bug, or somebody has cancelled all tasks
            raise end
    return [result for result in results if result is not None]


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
