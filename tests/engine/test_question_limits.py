"""Questions wait in a line of their own, with the limits of requests."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BatchedEngine, EngineBusy, SimpleEngine
from mlx_engine.testing import FakeEngine
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio

Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "fake": lambda _, **options: FakeEngine(**options),
    "fake batch": lambda _, **options: FakeEngine(max_batch_size=2, **options),
}


class Held:
    """Answers of an engine that stand still until they are let go."""

    def __init__(self, engine: Any) -> None:
        self.inside = 0
        self.go = threading.Event()
        self._real = engine._holder.answer
        engine._holder.answer = self

    def __call__(self, question: Any) -> Any:
        self.inside += 1
        assert self.go.wait(PATIENCE)
        return self._real(question)


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def holding(request: pytest.FixtureRequest, tiny_path: Path) -> Any:
    @asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[tuple[Any, Held]]:
        async with request.param(tiny_path, **options) as engine:
            held = Held(engine)
            try:
                yield engine, held
            finally:
                held.go.set()

    return make


def ask(engine: Any) -> asyncio.Task[int]:
    return asyncio.create_task(engine.count_tokens("Once"))


async def refused(engine: Any, match: str) -> None:
    for question in (
        engine.count_tokens("Once"),
        engine.render_chat([{"role": "user", "content": "Hi"}]),
        engine.encode("Once"),
        engine.decode([1]),
    ):
        with pytest.raises(EngineBusy, match=match) as caught:
            await question
        assert caught.value.retry_after > 0


@pytest.mark.parametrize("limit", [0, 2])
async def test_as_many_questions_wait_as_requests_may(holding: Any, limit: int) -> None:
    async with holding(queue_limit=limit) as (engine, held):
        tasks = [ask(engine) for _ in range(1 + limit)]
        await until(lambda: held.inside == 1)
        why = f"{limit} questions are waiting" if limit else "^no place is free now"
        await refused(engine, rf"{why} \(queue_limit={limit}\)")
        if tasks[1:]:
            tasks[-1].cancel()
            await asyncio.wait(tasks[-1:])
            tasks[-1] = ask(engine)
            await asyncio.sleep(0)
            await refused(engine, "questions are waiting")
        assert len((await engine.generate("Hi", max_tokens=1)).tokens) <= 1, "another line"
        held.go.set()
        assert len(set(await asyncio.gather(*tasks))) == 1
        assert await ask(engine)
        assert (engine.stats().rejected, engine.stats().finished) == (0, 1)


async def test_without_a_limit_all_wait(holding: Any) -> None:
    async with holding() as (engine, held):
        tasks = [ask(engine) for _ in range(50)]
        await until(lambda: held.inside == 1)
        held.go.set()
        assert len(set(await asyncio.gather(*tasks))) == 1


async def test_a_question_waits_no_longer_than_a_request_may(holding: Any) -> None:
    async with holding(max_wait=600) as (engine, held):
        first = ask(engine)
        await until(lambda: held.inside == 1)
        admission = engine._scheduler.admission
        admission._limits = dataclasses.replace(admission._limits, max_wait=0.01)
        with pytest.raises(EngineBusy, match=r"the question has waited for 0\.01 s"):
            await ask(engine)
        held.go.set()
        assert await first


async def test_a_question_that_may_not_wait_is_refused_at_once(holding: Any) -> None:
    async with holding(max_wait=0) as (engine, held):
        first = ask(engine)
        await until(lambda: held.inside == 1)
        await refused(engine, "max_wait=0")
        held.go.set()
        assert await first
        assert await ask(engine)


async def test_requests_that_wait_refuse_no_question(tiny_path: Path) -> None:
    async with SimpleEngine(tiny_path, queue_limit=0) as engine:
        began, go = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            assert go.wait(PATIENCE)

        held = asyncio.create_task(engine.run_blocking(hold))
        await until(began.is_set)
        try:
            with pytest.raises(EngineBusy):
                await engine.generate("Hi", max_tokens=1)
            assert await engine.count_tokens("Once") == 4
        finally:
            go.set()
            await held
