"""engine.map: items in, an outcome of each out, as they come."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    EngineBusy,
    EngineDead,
    EngineNotStarted,
    EngineState,
    EngineStopped,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    Outcome,
    Outcomes,
    Progress,
    SamplingParams,
)
from mlx_engine.engine import many
from mlx_engine.testing import FakeAnswer, FakeEngine
from mlx_engine.testing import Gate as PlayGate
from tests.conftest import other_tasks, settled
from tests.guard import Gate
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr(many, "_FIRST", 0.001)


async def test_each_item_has_its_outcome_the_same_as_by_itself(engine: BaseEngine) -> None:
    items: list[Any] = ["one", [2, 3], HI, [99999], "", 5]
    outcomes = {o.id: o async for o in engine.map(items, max_tokens=4, ignore_eos=True)}
    assert sorted(outcomes) == [0, 1, 2, 3, 4, 5]
    for index in (0, 1):
        alone = await engine.generate(items[index], max_tokens=4, ignore_eos=True)
        assert outcomes[index].unwrap().tokens == alone.tokens
    chat = await engine.chat(HI, max_tokens=4, ignore_eos=True)
    assert outcomes[2].unwrap().tokens == chat.tokens
    for index in (3, 4, 5):
        assert not outcomes[index].ok
        assert outcomes[index].result is None
        with pytest.raises(InvalidRequest, match="prompt"):
            outcomes[index].unwrap()
    assert {o.attempts for o in outcomes.values()} == {1}


async def test_an_outcome_as_plain_data() -> None:
    async with FakeEngine.script("yes", GenerationError("boom")) as engine:
        good, bad = [o async for o in engine.map({"a": "x", "b": "y"}, ordered=True, retries=0)]
    line = json.loads(json.dumps(good.to_dict(tokens=True)))
    assert line["result"] == good.unwrap().to_dict(tokens=True)
    assert (line["id"], line["index"], line["attempts"], line["error"]) == ("a", 0, 1, None)
    assert "tokens" not in good.to_dict()["result"]
    assert bad.to_dict() == {
        "id": "b",
        "index": 1,
        "attempts": 1,
        "result": None,
        "error": {"type": "GenerationError", "message": "boom", "retryable": True},
    }


async def test_the_ids_of_items() -> None:
    async def later(items: Any) -> AsyncIterator[Any]:
        for item in items:
            await asyncio.sleep(0)
            yield item

    async with FakeEngine("a", max_batch_size=4) as engine:
        two_messages = (HI[0], {"role": "user", "content": "ho"})
        cases: list[tuple[Any, list[Any]]] = [
            (["x", "y"], [0, 1]),
            (iter(["x", "y"]), [0, 1]),
            (later(["x", "y"]), [0, 1]),
            ({"a": "x", "b": HI}, ["a", "b"]),
            (zip("ab", ["x", "y"], strict=True), ["a", "b"]),
            (later([(("k", 1), [5, 6])]), [("k", 1)]),
            ([(5, 6), (7, 8)], [0, 1]),  # token ids
            ([two_messages], [0]),
            ([(3, HI), (4, HI)], [3, 4]),
            ([], []),
        ]
        for items, ids in cases:
            got = [o async for o in engine.map(items, ordered=True)]
            assert [o.id for o in got] == ids
            assert [o.index for o in got] == list(range(len(ids)))
            assert all(o.ok for o in got)


async def test_ordered_or_as_they_are_completed() -> None:
    gate = PlayGate()
    answers = {"slow": ["a", gate], "quick": "b"}
    async with FakeEngine(answers, max_batch_size=4) as engine:
        async with engine.map(["slow", "quick", "quick"]) as outcomes:
            assert [(await anext(outcomes)).index for _ in range(2)] == [1, 2]
            gate.open()
            assert (await anext(outcomes)).index == 0
        again = PlayGate()
        answers["slow"] = ["a", again]
        ordered = engine.map(["slow", "quick", "quick"], ordered=True)
        first = asyncio.create_task(anext(ordered))  # type: ignore[arg-type]
        await until(lambda: engine.stats().finished == 5)
        assert not first.done()
        again.open()
        assert (await first).index == 0
        assert [o.index async for o in ordered] == [1, 2]


@pytest.mark.parametrize("ordered", [False, True])
async def test_an_endless_iterator_is_read_no_further_than_it_is_needed(ordered: bool) -> None:
    last = 0

    def items() -> Iterator[str]:
        nonlocal last
        while True:
            yield "x"
            last += 1

    async with FakeEngine("a", max_batch_size=2) as engine:
        async with engine.map(items(), concurrency=3, ordered=ordered) as outcomes:
            await until(lambda: engine.stats().finished >= 12)
            await turns()
            assert last < 12
            for _ in range(100):
                await anext(outcomes)
            assert last < 112
        assert not other_tasks()
        assert engine.stats().running == engine.stats().waiting == 0


async def test_no_more_than_its_concurrency_at_a_time() -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=8) as engine:
        many = engine.map([str(i) for i in range(9)], concurrency=3)
        async with many as outcomes:
            await until(lambda: engine.stats().running == 3)
            await turns()
            assert engine.stats().running + engine.stats().waiting == 3
            gate.open()
            assert len([o async for o in outcomes]) == 9


async def test_there_are_no_more_tasks_than_items() -> None:
    gate = PlayGate()
    items = (str(number) for number in range(3))
    async with (
        FakeEngine(["a", gate], max_batch_size=8) as engine,
        engine.map(items, concurrency=10**9) as outcomes,
    ):
        before = len(asyncio.all_tasks())
        await gate.reached(3)
        assert len(asyncio.all_tasks()) < before + 10
        gate.open()
        assert len([o async for o in outcomes]) == 3


async def test_break_leaves_nothing_running() -> None:
    async with FakeEngine(lambda r: "x" if r.prompt == "1" else ["a", PlayGate()]) as engine:
        async for outcome in engine.map(["1", "2", "3"]):
            assert outcome.id == 0
            break
        gc.collect()
        await until(lambda: not other_tasks())
        assert engine.stats().running == engine.stats().waiting == 0


async def test_a_cancel_keeps_what_is_done() -> None:
    gate = PlayGate()
    kept: list[Outcome[int]] = []
    async with FakeEngine({"quick": "b", "slow": ["a", gate]}, max_batch_size=8) as engine:
        outcomes = engine.map(["quick", "quick", "slow"], ordered=True)

        async def read() -> None:
            async for outcome in outcomes:
                kept.append(outcome)  # noqa: PERF401 - one by one is the point

        task = asyncio.create_task(read())
        await until(lambda: len(kept) == 2)
        for _ in range(3):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not other_tasks()
        assert engine.requests[-1].outcome == "cancelled"
        assert [o.index for o in kept] == [0, 1]
        unordered = engine.map(["slow", "quick", "quick"], ordered=True)
        waiting = asyncio.create_task(anext(unordered))  # type: ignore[arg-type]
        await until(lambda: len(unordered.unread) == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [o.index for o in unordered.unread] == [1, 2]
        assert [o.index async for o in unordered] == [1, 2]


async def test_cancel_from_another_thread_ends_the_reading() -> None:
    gate = PlayGate()
    async with FakeEngine({"quick": "b", "slow": ["a", gate]}, max_batch_size=8) as engine:
        async with engine.map(["quick", "slow"]) as outcomes:
            assert (await anext(outcomes)).ok
            await asyncio.to_thread(outcomes.cancel)
            assert [o async for o in outcomes] == []
        assert engine.requests[-1].outcome == "cancelled"


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_inside_mlx_it_waits_until_that_is_out(
    engine: BaseEngine, gate: MakeGate, times: int
) -> None:
    stop = gate("model", 6)
    outcomes = engine.map(([n] for n in itertools.count(1)), max_tokens=500, ignore_eos=True)
    task = asyncio.ensure_future(anext(outcomes))  # type: ignore[arg-type]
    await stop.reached()
    for _ in range(times):
        task.cancel()
        await turns()
        assert not task.done()
    stop.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled()
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.finished == 0
    assert (await engine.generate([1], max_tokens=2, ignore_eos=True)).finish_reason == "length"


async def test_what_is_retryable_is_tried_again() -> None:
    failures = iter([GenerationError("a"), GenerationError("b")])

    def answer(request: Any) -> Any:
        error = next(failures, None)
        return "x" if error is None else ["y", error]

    async with FakeEngine(answer) as engine:
        (outcome,) = [o async for o in engine.map(["p"], retries=2)]
        assert (outcome.attempts, outcome.unwrap().text) == (3, "x")
        failures = iter([GenerationError("a"), GenerationError("b")])
        (outcome,) = [o async for o in engine.map(["p"], retries=1)]
        assert (outcome.attempts, str(outcome.error)) == (2, "b")
        failures = iter([ValueError("a mistake, which would be made again")])  # type: ignore[list-item]
        (outcome,) = [o async for o in engine.map(["p"], retries=5)]
        assert outcome.attempts == 1


async def test_a_dead_engine_is_restarted_for_a_retry_once() -> None:
    deaths = iter([EngineDead("gone")])

    def answer(request: Any) -> Any:
        error = next(deaths, None)
        return "x" if error is None else ["y", error]

    async with FakeEngine(answer, max_batch_size=4) as engine:
        outcomes = [o async for o in engine.map([str(i) for i in range(20)], retries=1)]
        assert all(o.ok for o in outcomes)
        assert max(o.attempts for o in outcomes) == 2
        assert engine.state is EngineState.RUNNING


async def test_if_the_engine_ends_what_was_under_way_says_so_and_then_it_is_raised() -> None:
    gate = PlayGate()
    async with FakeEngine(["a", gate], max_batch_size=2) as engine:
        outcomes = engine.map(["x"] * 20, concurrency=2)
        first = asyncio.create_task(anext(outcomes))  # type: ignore[arg-type]
        await gate.reached()
        await engine.stop()
        told = [(await first)]
        with pytest.raises(EngineStopped):
            async for outcome in outcomes:
                told.append(outcome)  # noqa: PERF401 - what came before the error counts
        assert len(told) == 2
        assert all(isinstance(o.error, EngineStopped) for o in told)
        with pytest.raises(EngineNotStarted):
            _ = [o async for o in FakeEngine().map(["a", "b", "c"], concurrency=1)]


async def test_places_that_others_have_are_waited_for_or_not() -> None:
    gate = PlayGate()
    async with FakeEngine({"other": ["a", gate], "mine": "b"}, queue_limit=0) as engine:
        other = asyncio.create_task(engine.generate("other"))
        await gate.reached()
        (refused,) = [o async for o in engine.map(["mine"], max_wait=0.05)]
        assert isinstance(refused.error, EngineBusy)
        many = asyncio.create_task(anext(engine.map(["mine"])))  # type: ignore[arg-type]
        await turns()
        assert not many.done()
        gate.open()
        assert (await many).attempts == 1
        await other


async def test_progress_tells_how_many_are_over() -> None:
    seen: list[Progress] = []
    async with FakeEngine("a") as engine:
        _ = [o async for o in engine.map(["x", "y"], on_progress=seen.append)]
        _ = [o async for o in engine.map(iter(["x"]), on_progress=seen.append)]
    assert seen == [Progress("batch", 1, 2), Progress("batch", 2, 2), Progress("batch", 1, None)]


async def test_the_error_of_the_items_comes_behind_the_outcomes() -> None:
    def items() -> Iterator[str]:
        yield "x"
        raise ZeroDivisionError

    async with FakeEngine("a") as engine:
        outcomes = engine.map(items())
        assert (await anext(outcomes)).ok
        with pytest.raises(ZeroDivisionError):
            await anext(outcomes)
        with pytest.raises(StopAsyncIteration):
            await anext(outcomes)
        assert not other_tasks()


async def test_an_error_that_is_not_ours_is_raised_whenever_it_comes() -> None:
    class Failing(FakeEngine):
        """Its prompts are answered in the same turn of the event loop, or fail there."""

        async def generate(self, prompt: Any, *args: Any, **options: Any) -> GenerationResult:
            await together.wait()
            if prompt == "b":
                raise ZeroDivisionError
            return answer

    async def read_all(outcomes: Outcomes[int]) -> None:
        async for outcome in outcomes:
            read.append(outcome.id)  # noqa: PERF401 - it has those before the error, too

    read: list[int] = []
    together = asyncio.Event()
    async with Failing("x") as engine:
        answer = await FakeEngine.generate(engine, "a")
        for work in (
            read_all(engine.map(["a", "b"], concurrency=2)),
            read_all(engine.map(["a", "b"], concurrency=2, ordered=True)),
            engine.generate_batch(["a", "b"]),
        ):
            together.clear()
            task = asyncio.create_task(work)
            await turns()
            together.set()
            with pytest.raises(ZeroDivisionError):
                await task
    assert read == [0, 0]


async def test_mistakes_are_told_at_once() -> None:
    engine = FakeEngine()
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("prompts", "text", {}),
        ("prompts", 5, {}),
        ("prompts", HI, {}),
        ("concurrency", ["a"], {"concurrency": 0}),
        ("ordered", ["a"], {"ordered": 1}),
        ("retries", ["a"], {"retries": -1}),
        ("timeout", ["a"], {"timeout": 0}),
        ("max_wait", ["a"], {"max_wait": -1}),
        ("temperature", ["a"], {"temperature": -1}),
        ("output", ["a"], {"output": 5}),
        ("on_progress", ["a"], {"on_progress": 5}),
        ("max_workers", ["a"], {"max_workers": 5}),
    ]
    for option, items, options in bad:
        with pytest.raises(InvalidRequest, match=f"^{option}: "):
            engine.map(items, **options)
    with pytest.raises(InvalidRequest, match="write concurrency="):
        engine.map(["a"], max_workers=5)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match="one conversation"):
        await engine.generate_batch(HI)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="async for outcome in engine"):
        await engine.map(["a"])  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"async with engine\.stream_chat"):
        await engine.stream_chat(HI)  # type: ignore[misc]


async def test_options_of_chats_are_for_conversations() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = FakeAnswer(tool_calls=[("f", {})])
    async with FakeEngine(lambda r: answer if r.tools else "a") as engine:
        plain, chat = [o async for o in engine.map(["x", HI], tools=tools, ordered=True)]
        assert isinstance(plain.error, InvalidRequest)
        assert chat.unwrap().tool_calls[0].name == "f"


async def test_a_batch_takes_conversations_too(engine: BaseEngine) -> None:
    results = await engine.generate_batch(["one", HI], SamplingParams(max_tokens=3))
    chat = await engine.chat(HI, max_tokens=3)
    assert isinstance(results[1], GenerationResult)
    assert results[1].tokens == chat.tokens
    assert isinstance(results[0], GenerationResult)


async def test_typed_answers_come_from_map() -> None:
    async with FakeEngine('{"a": 1}') as engine:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        (outcome,) = [o async for o in engine.map([HI], output=schema)]
        assert outcome.unwrap().parsed == {"a": 1}


async def test_a_wrapper_maps_through_its_own_chat() -> None:
    class Counting(FakeEngine):
        asked = 0

        async def chat(self, *args: Any, **options: Any) -> GenerationResult:
            self.asked += 1
            return await super().chat(*args, **options)

    async with Counting("a") as engine:
        outcomes: Outcomes[int] = engine.map([HI, HI])
        assert len([o async for o in outcomes]) == 2
        assert engine.asked == 2


async def test_a_long_wait_for_an_engine_that_is_busy_is_in_the_log_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(many, "_LONG", 0.0)
    busy = EngineBusy("no place", retry_after=0.0)
    async with FakeEngine.script(busy, busy, "a", "b") as engine:
        outcomes = [one async for one in engine.map(["x", "y"], concurrency=1)]
    assert [one.attempts for one in outcomes] == [1, 1]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "map waits, for 0 s by now (max_wait bounds that): no place"
