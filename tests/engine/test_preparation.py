"""Prompts are rendered and tokenized on threads of their own, and nobody is told too early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    ContextLengthExceeded,
    EngineBusy,
    EngineStopped,
    GenerationError,
    SimpleEngine,
)
from mlx_engine.core import (
    threads,
)
from mlx_engine.core.mlx_thread import mlx_thread
from tests.waiting import PATIENCE, expire, turns, until

pytestmark = pytest.mark.anyio

HELD = "hold me"  # the prompt whose preparation stands still


class Held:
    """The preparation of prompts with ``HELD`` in them stands still until they are let go."""

    def __init__(self, engine: BaseEngine, step: str) -> None:
        self.inside = 0
        self.threads: set[str] = set()
        self.sizes: list[int] = []  # characters of each text that was tokenized
        self._go = threading.Event()
        tokenizer = engine._holder.vocabulary.tokenizer._tokenizer  # type: ignore[attr-defined]
        self._owner, self._step, self._real = tokenizer, step, getattr(tokenizer, step)
        setattr(tokenizer, step, self._call)

    def _call(self, what: Any, *args: Any, **options: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        self.sizes.append(len(what))
        if HELD in str(what):
            self.inside += 1
            assert self._go.wait(PATIENCE)
            self.inside -= 1
        return self._real(what, *args, **options)

    async def reached(self, count: int = 1) -> None:
        await until(lambda: self.inside == count)

    def go(self) -> None:
        self._go.set()

    def restore(self) -> None:
        self.go()
        setattr(self._owner, self._step, self._real)


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make(engine: BaseEngine, step: str = "encode") -> Held:
        made.append(Held(engine, step))
        return made[-1]

    yield make
    for held in made:
        held.restore()


def ask(engine: BaseEngine, prompt: str, **options: Any) -> asyncio.Task[Any]:
    options = {"max_tokens": 3, "ignore_eos": True} | options
    return asyncio.create_task(engine.generate(prompt, **options))


def chat(engine: BaseEngine, text: str, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(
        engine.chat([{"role": "user", "content": text}], max_tokens=3, **options)
    )


async def read(engine: BaseEngine, text: str) -> None:
    async with engine.stream_generate(text, max_tokens=3) as stream:
        async for _ in stream:
            pass


ASKED = {
    "generate": (ask, "encode"),
    "chat, tokenizing": (chat, "encode"),
    "chat, rendering": (chat, "apply_chat_template"),
    "stream": (lambda engine, text: asyncio.create_task(read(engine, text)), "encode"),
}


@pytest.mark.parametrize("asked", ASKED)
async def test_a_cancelled_caller_stays_until_its_prompt_is_left_and_mlx_is_free_meanwhile(
    engine: BaseEngine, hold: Callable[..., Held], asked: str
) -> None:
    start, step = ASKED[asked]
    held = hold(engine, step)
    task = start(engine, HELD)
    await held.reached()
    for _ in range(3):
        task.cancel()
        await turns()
        assert not task.done()
        assert engine.stats().waiting == 1
        assert not mlx_thread.locked
    held.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held.inside == 0
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cancelled) == (0, 0, 1)
    assert stats.prompt_tokens == 0  # MLX never saw it
    assert held.threads <= {"prepare"}
    assert len((await ask(engine, "next")).tokens) == 3


async def test_a_prompt_that_is_cancelled_between_rendering_and_tokenizing_is_not_tokenized(
    engine: BaseEngine, hold: Callable[..., Held]
) -> None:
    rendering, tokenizing = hold(engine, "apply_chat_template"), hold(engine)
    task = chat(engine, HELD)
    await rendering.reached()
    task.cancel()
    await asyncio.sleep(0)
    tokenizing.go()
    rendering.go()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tokenizing.sizes == []


async def test_a_time_limit_ends_a_request_whose_prompt_is_being_tokenized(
    engine: BaseEngine, hold: Callable[..., Held]
) -> None:
    held = hold(engine)

    async def let_go(limit: asyncio.Timeout) -> None:
        await expire(limit, lambda: held.inside)
        await until(limit.expired)
        await turns()
        held.go()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            helper = asyncio.create_task(let_go(limit))
            await engine.generate(HELD)
    assert held.inside == 0
    await helper


async def test_a_stream_goes_on_to_its_end_while_another_prompt_is_being_tokenized(
    tiny_path: Path, hold: Callable[..., Held]
) -> None:
    async with BatchedEngine(tiny_path) as engine:
        held = hold(engine)
        waiting = ask(engine, HELD)
        await held.reached()
        result = await ask(engine, "short", max_tokens=50)
        assert len(result.tokens) == 50
        assert held.inside == 1
        held.go()
        assert len((await waiting).tokens) == 3


async def test_nobody_overtakes_who_came_before_but_other_engines_go_on(
    tiny_path: Path, hold: Callable[..., Held]
) -> None:
    async with SimpleEngine(tiny_path) as engine, SimpleEngine(tiny_path) as other:
        held = hold(engine)
        order: list[str] = []

        def noted(task: asyncio.Task[Any], name: str) -> asyncio.Task[Any]:
            task.add_done_callback(lambda _: order.append(name))
            return task

        tasks = [noted(ask(engine, HELD), "first")]
        await held.reached()
        tasks.append(noted(ask(engine, "second"), "second"))
        tasks.append(noted(asyncio.create_task(engine.run_blocking(lambda: None)), "third"))
        await noted(ask(other, "elsewhere"), "other")
        assert order == ["other"]
        assert engine.stats().waiting == 3
        held.go()
        await asyncio.gather(*tasks)
    assert order == ["other", "first", "second", "third"]


async def test_who_is_behind_a_prompt_goes_on_when_that_is_cancelled(
    tiny_path: Path, hold: Callable[..., Held]
) -> None:
    """In a batch with one place, and in an engine without one."""
    for engine in (SimpleEngine(tiny_path), BatchedEngine(tiny_path, max_batch_size=1)):
        async with engine:
            held = hold(engine)
            first, second = ask(engine, HELD), ask(engine, "second")
            await held.reached()
            await until(lambda held=held: len(held.sizes) == 2)
            assert not second.done()
            first.cancel()
            assert len((await second).tokens) == 3  # the first is still being prepared
            assert not first.done()
            held.go()
            with pytest.raises(asyncio.CancelledError):
                await first


async def test_prompts_are_prepared_by_two_threads_at_most_and_the_others_leave_at_once(
    engine: BaseEngine, hold: Callable[..., Held]
) -> None:
    held = hold(engine)
    tasks = [ask(engine, f"{HELD} {n}") for n in range(6)]
    await held.reached(2)
    assert sum(thread.name == "prepare" for thread in threading.enumerate()) == 2
    assert engine.stats().waiting == 6
    tasks[5].cancel()  # no thread has it
    with pytest.raises(asyncio.CancelledError):
        await tasks[5]
    assert held.inside == 2
    held.go()
    for task in tasks[:5]:
        assert len((await task).tokens) == 3
    await until(lambda: all(thread.name != "prepare" for thread in threading.enumerate()))


async def test_a_stop_aborts_those_that_are_being_prepared_and_comes_back_when_they_are_left(
    engine: BaseEngine, hold: Callable[..., Held]
) -> None:
    held = hold(engine)
    task = ask(engine, HELD)
    await held.reached()
    stopping = asyncio.create_task(engine.shutdown(0))
    await turns()
    assert not stopping.done()
    held.go()
    report = await stopping
    assert len(report.aborted) == 1
    with pytest.raises(EngineStopped):
        await task


async def test_time_in_preparation_is_not_waiting(
    tiny_path: Path, engine_type: Any, hold: Callable[..., Held]
) -> None:
    async with engine_type(tiny_path, max_wait=0.5) as engine:
        held = hold(engine)
        task = ask(engine, HELD)
        await held.reached()
        await asyncio.sleep(0.6)
        assert not task.done()
        others = [ask(engine, f"{HELD} too") for _ in range(2)]
        with pytest.raises(EngineBusy):  # of these, one only waits for a thread
            await others[1]
        held.go()
        outcomes = await asyncio.gather(task, others[0], return_exceptions=True)
        assert not isinstance(outcomes[0], GenerationError)


async def test_a_prompt_that_is_far_too_long_is_refused_before_all_of_it_is_tokenized(
    tiny_path: Path, engine_type: Any, hold: Callable[..., Held]
) -> None:
    async with engine_type(tiny_path, context_length=10_000) as engine:
        held = hold(engine)
        text = "word " * 60_000
        with pytest.raises(ContextLengthExceeded, match="characters of prompt have more than"):
            await engine.generate(text)
        assert sum(held.sizes) < len(text) / 2
        assert len(held.sizes) >= 1
        held.sizes.clear()
        dense = "x" * 70_000  # no more characters than may fit, but each is a token
        with pytest.raises(ContextLengthExceeded, match="characters of prompt have more than"):
            await engine.generate(dense)
        assert max(held.sizes) < len(dense)


class NoThreads:
    """Threads that prepare prompts do not come to run."""

    def __init__(self, patch: pytest.MonkeyPatch, *, silent: bool) -> None:
        self.asked = 0
        self.over = threading.Event()
        self._silent = silent
        self._start = threading.Thread.start
        patch.setattr(threads, "START_LIMIT", 0.2)
        patch.setattr(threading.Thread, "start", lambda thread: self._refuse(thread))

    def _refuse(self, thread: threading.Thread) -> None:
        if thread.name != "prepare":
            self._start(thread)
            return
        self.asked += 1
        if self._silent:
            self.over.wait(30)
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("kind", [SimpleEngine, BatchedEngine])
@pytest.mark.parametrize("limits", [{"max_wait": 0}, {"queue_limit": 0}])
async def test_a_prompt_that_is_being_prepared_makes_its_own_engine_busy_and_no_other(
    tiny_path: Path, hold: Callable[..., Held], kind: Any, limits: dict[str, Any]
) -> None:
    if kind is BatchedEngine:
        limits = limits | {"max_batch_size": 1}
    async with SimpleEngine(tiny_path) as other, kind(tiny_path, **limits) as engine:
        elsewhere, here = hold(other), hold(engine)
        tasks = [ask(other, HELD)]
        await elsewhere.reached()
        assert len((await ask(engine, "free")).tokens) == 3
        tasks.append(ask(engine, HELD))
        await here.reached()
        with pytest.raises(EngineBusy):
            await ask(engine, "busy")
        elsewhere.go()
        here.go()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("silent", [False, True])
async def test_without_threads_all_that_wait_are_told_and_the_next_one_works(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """Also those for which no thread was started: others were on their way, but never came."""
    with monkeypatch.context() as patch:
        none = NoThreads(patch, silent=silent)
        tasks = [ask(engine, str(number)) for number in range(5)]
        async with asyncio.timeout(30):
            told = await asyncio.gather(*tasks, return_exceptions=True)
        none.over.set()
    said = "it did not come to run" if silent else "can't start new thread"
    assert [type(each) for each in told] == [GenerationError] * 5
    assert all(said in str(each) for each in told)
    assert none.asked == 2 or not silent  # who is told at once makes place for another try
    assert engine.stats().failed == 5
    assert engine.stats().waiting == 0
    assert len((await ask(engine, "two")).tokens) == 3


async def test_every_eighth_prompt_that_is_prepared_is_the_one_that_came_first(
    tiny_path: Path, hold: Callable[..., Held]
) -> None:
    """Or the place that is kept for it would stand empty until all better ones are prepared."""
    async with BatchedEngine(tiny_path, max_batch_size=1) as engine:
        order: list[str] = []
        prepare = engine._scheduler._prepare

        def watched(request: Any) -> Any:
            order.append(request.asked.source.prompt)
            return prepare(request)

        engine._scheduler._prepare = watched  # type: ignore[attr-defined]
        held = hold(engine)
        first = [ask(engine, HELD, priority=-1) for _ in range(2)]
        await held.reached(2)
        tasks = [ask(engine, "patient", priority=1)]
        await asyncio.sleep(0)
        tasks += [ask(engine, "important", priority=-1) for _ in range(40)]
        await asyncio.sleep(0)
        held.go()
        await asyncio.gather(*first, *tasks)
    assert order.index("patient") == 7


async def test_a_closed_loop_does_not_leave_its_prompt_behind(tiny_path: Path) -> None:
    """The loop is closed under a request that is being prepared; others are served."""
    async with BatchedEngine(tiny_path) as engine:
        held = Held(engine, "encode")
        try:
            loop = asyncio.new_event_loop()

            def other_loop() -> None:
                asyncio.set_event_loop(loop)
                task = loop.create_task(engine.generate(HELD))
                loop.run_until_complete(asyncio.sleep(0))
                loop.run_until_complete(until(lambda: held.inside == 1))
                del task
                loop.set_exception_handler(lambda *_: None)
                loop.close()

            thread = threading.Thread(target=other_loop)
            thread.start()
            await asyncio.to_thread(thread.join)
            held.go()
            assert len((await ask(engine, "next")).tokens) == 3
            await until(lambda: engine.stats().waiting == 0)
        finally:
            held.restore()
