"""``assert_cancellation_safe``: does an engine keep its promises, here, with this model?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from mlx_engine.checks import number
from mlx_engine.engine.base import BaseEngine
from mlx_engine.testing.safety.fault import Fault
from mlx_engine.testing.safety.plan import Choice
from mlx_engine.testing.safety.report import (
    NotCancellationSafe,
    SafetyFailure,
    SafetyReport,
    machine,
)
from mlx_engine.testing.safety.sweep import Sweep
from mlx_engine.testing.safety.timeouts import Hang, Timeouts

PROMPT: Final = "Once upon a time there was a lighthouse keeper who counted the ships. " * 2


def assert_cancellation_safe(
    engine_factory: Callable[[], BaseEngine],
    *,
    prompt: str = PROMPT,
    seconds: float = 60.0,
    seed: int = 0,
    only: str | None = None,
    exact: bool | None = None,
    report: Callable[[str], None] | None = print,
) -> SafetyReport:
    """Cancel everything that an engine does, in every way, at every moment that there is time for.

        assert_cancellation_safe(lambda: SimpleEngine("mlx-community/..."), seconds=300)

    Requests, streams, chats, batches, functions, files of the prompt cache, starts and stops are
    done once unharmed, to count the steps of the event loop that they take. Then they are
    cancelled before each of these steps and in between, in event loops of their own and in real
    time: by ``Task.cancel`` once, twice and at every step, ``asyncio.timeout``, a ``TaskGroup``,
    anyio scopes, and the end of the event loop. After each time

    - a cancelled caller has been told so, and no other;
    - no task and no unhandled error is left in the event loop;
    - what was inside MLX is out when its caller is told, and two never were at once, as far as
      the check's own functions and logits processors there can see;
    - the engine is at rest, and has counted each request once;
    - the next request has the right tokens, and so has one that was under way at the same time;
    - nothing takes more than twenty times as long as usual, and ten seconds.

    Nobody else may use the engine meanwhile. It is made, started, stopped and made again many
    times; never are two of them loaded at once. It runs in a thread of its own: in a coroutine,
    put ``asyncio.to_thread`` around it. Engines that do I/O in the event loop itself cannot be
    checked.

    Args:
        engine_factory: makes an engine that is not started, the same each time.
        prompt: of requests that are cancelled; each begins with another number, so that it is
            prefilled. Longer than ``prefill_step_size``, there are moments between its chunks.
        seconds: that may be spent on it, once the model is loaded. If that is not enough for
            all, moments are drawn: first one of each operation, in different ways, then one of
            each operation in each way, then others. The report says what there was no time for;
            one request and one stop are tried in any case.
        seed: of that draw.
        only: what to try, as failures name it: ``"operation"``, ``"operation / way"``, or
            ``"operation / way / moment"``, which is tried again and again.
        exact: whether a request has the same tokens whatever is in a batch with it, as in
            float32. If not, such requests are compared by their length. ``None``: only if the
            engine serves one at a time.
        report: told of the progress, and of the report at the end; from another thread.

    Returns:
        What was tried, and how long it took until work was out of MLX.

    Raises:
        NotCancellationSafe: an ``AssertionError``, with the report: a promise is not kept.
        InvalidRequest: an argument is not acceptable.
        MLXEngineError: the engine cannot be started, or refuses all requests.
        RuntimeError: called in a running event loop, which would be blocked.
    """
    found = check_cancellation(
        engine_factory,
        prompt=prompt,
        seconds=seconds,
        seed=seed,
        only=only,
        exact=exact,
        say=report or _say_nothing,
    )
    if report is not None:
        report(str(found))
    if found.failures:
        raise NotCancellationSafe(found)
    return found


def check_cancellation(
    engine_factory: Callable[[], BaseEngine],
    *,
    prompt: str,
    seconds: float,
    seed: int,
    only: str | None,
    exact: bool | None,
    say: Callable[[str], None],
) -> SafetyReport:
    """``assert_cancellation_safe``, for those who look at the report themselves.

    Args:
        say: told of the progress, and of failures, from another thread.
    """
    _check_outside()
    seconds = number("seconds", seconds, low=0, above=True, what="a number of seconds")
    timeouts, choice = Timeouts(), Choice.parse(only)
    sweep = Sweep(engine_factory, prompt, seconds, seed, choice, exact, say, timeouts)
    began = time.monotonic()
    try:
        timeouts.run(sweep.run)
    except (Hang, Fault) as error:
        sweep.failures.append(SafetyFailure.of(sweep.where, error))
    return SafetyReport(
        sweep.kind,
        sweep.rows(),
        tuple(sweep.failures),
        tuple(sweep.notes),
        machine(),
        seed,
        time.monotonic() - began,
    )


def _check_outside() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "assert_cancellation_safe runs event loops of its own and would block this one: put "
        "asyncio.to_thread around it"
    )


def _say_nothing(_: str) -> None:
    pass
