"""The threads that prepare prompts: none is counted that is not there, none holds what it did."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_engine import BaseEngine, GenerationError
from mlx_engine.core import preparer, threads
from mlx_engine.core.preparer import Preparer, Preparing
from mlx_engine.core.work import PendingWork
from tests.waiting import until

pytestmark = pytest.mark.anyio


def never_runs(thread: threading.Thread) -> None:
    """As where memory is short: the thread ends before it can say that it runs."""


async def test_who_leaves_before_its_thread_comes_does_not_keep_the_next_one_from_a_thread(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threads, "START_LIMIT", 0.05)
        patch.setattr(threading.Thread, "start", never_runs)
        for _ in range(2):
            task = asyncio.create_task(engine.generate("a", max_tokens=3))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    await until(lambda: engine._scheduler._preparer._threads == 0)  # type: ignore[attr-defined]
    assert len((await engine.generate("next", max_tokens=3)).tokens) == 3


async def test_a_pause_of_the_whole_process_is_not_the_threads_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has not run for longer than the limit, and nothing else has: a lid was closed."""
    goes_on, ran, failures = threading.Event(), threading.Event(), []
    begin = threading.Thread.start

    def later(thread: threading.Thread) -> None:
        goes_on.wait()
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "START_LIMIT", 5.0)
        patch.setattr(threading.Thread, "start", later)
        start = threads.Start(ran.set, "late", failures.append)
        start.begin()
        limit = start.limit()
        patch.setattr(threads, "START_LIMIT", 60.0)
        time.sleep(1.0)  # the first of ten times, and more  # noqa: ASYNC251
        await asyncio.sleep(0)
        goes_on.set()
        await until(ran.is_set)
    limit.cancel()
    assert not failures


async def test_a_thread_that_goes_on_holds_nothing_of_what_it_did_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparer, "_THREADS", 1)
    line = SimpleNamespace(take_to_prepare=lambda _: True, left=lambda *_: None)
    preparing: Preparer[Any] = Preparer(line)  # type: ignore[arg-type]
    steps = [threading.Event(), threading.Event()]
    refs = []
    for step in steps:
        work = Preparing(
            preparing, PendingWork(attended=False), lambda step=step: not step.wait(30)
        )
        refs.append(weakref.ref(work))
        work.begin()
        del work
    steps[0].set()
    await until(lambda: refs[0]() is None)
    assert refs[1]() is not None
    steps[1].set()
    await until(lambda: refs[1]() is None)


@pytest.mark.parametrize("threads_end", [True, False])
async def test_work_that_waits_elsewhere_is_done_one_piece_at_a_time(
    monkeypatch: pytest.MonkeyPatch, threads_end: bool
) -> None:
    monkeypatch.setattr(preparer, "_LINGER", 0.0 if threads_end else 60.0)
    here, elsewhere = (
        SimpleNamespace(take_to_prepare=lambda _: True, left=lambda *_: None) for _ in range(2)
    )
    preparing: Preparer[Any] = Preparer(here)  # type: ignore[arg-type]
    inside, most, done = 0, 0, [0, 0]

    def work(place: int) -> None:
        nonlocal inside, most
        inside += place
        most = max(most, inside)
        threading.Event().wait(0.001)
        inside -= place
        done[place] += 1

    for _ in range(3):
        for n in range(40):
            place = n % 4 != 0
            queue = elsewhere if place else here
            func = functools.partial(work, place)
            Preparing(preparing, PendingWork(attended=False), func, queue).begin()  # type: ignore[arg-type]
        await until(lambda: not preparing._elsewhere and not preparing._by_rank)
    await until(lambda: done == [30, 90])
    assert most == 1
    monkeypatch.setattr(preparer, "_LINGER", 0.0)
    with preparing._changed:
        preparing._idle = 0
        preparing._changed.notify_all()
    await until(lambda: preparing._threads == 0)


async def test_a_thread_waits_a_moment_for_the_next_prompt(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    begin = threads.Start.begin

    def noted(start: threads.Start) -> None:
        started.append(start.thread.name)
        begin(start)

    monkeypatch.setattr(threads.Start, "begin", noted)
    monkeypatch.setattr(preparer, "_LINGER", 60.0)
    waiting = engine._scheduler._preparer  # type: ignore[attr-defined]
    for _ in range(3):
        await engine.generate("a", max_tokens=1)
        await until(lambda: waiting._idle == 1)
    assert started.count("prepare") == 1
    both = [asyncio.create_task(engine.generate(text, max_tokens=1)) for text in "bc"]
    await asyncio.gather(*both)
    assert started.count("prepare") <= 2
    monkeypatch.setattr(preparer, "_LINGER", 0.0)
    for text in "de":  # whoever takes one waits no more
        await asyncio.gather(*(engine.generate(text, max_tokens=1) for _ in range(4)))
    with waiting._changed:
        waiting._idle = 0
        waiting._changed.notify_all()
    await until(lambda: waiting._threads == 0)


async def test_where_a_prompt_failed_is_told_with_the_thread_on_which_it_did(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    tokenizer = engine._holder.vocabulary.tokenizer._tokenizer  # type: ignore[attr-defined]
    monkeypatch.setattr(tokenizer, "encode", broken)
    with pytest.raises(GenerationError) as caught:
        await engine.generate("a")
    (note,) = caught.value.__cause__.__notes__  # type: ignore[union-attr]
    assert note.startswith("On the thread 'prepare':")
    assert "in broken" in note
