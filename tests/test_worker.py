"""The MLX thread, the generation lock and the drain (I1, I2, I4, I5)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from mlx_engine.core.mlx_thread import MLXThread, mlx_thread
from mlx_engine.core.work import Stage, ThreadJob
from mlx_engine.errors import EngineDead
from tests.conftest import other_tasks
from tests.waiting import PATIENCE, expire, turns, until

pytestmark = pytest.mark.anyio


class Work:
    """A worker function that the test lets go: it runs until released or asked to stop."""

    def __init__(self, *, obedient: bool = False, result: Any = "done") -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.stopped = threading.Event()
        self.returned = threading.Event()
        self.cancels = 0
        self._obedient = obedient
        self._result = result

    def __call__(self) -> Any:
        self.entered.set()
        self.release.wait(PATIENCE)
        self.returned.set()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def on_cancel(self) -> None:
        self.cancels += 1
        self.stopped.set()
        if self._obedient:
            self.release.set()


async def run(func: Callable[[], Any], on_cancel: Callable[[], None] | None = None) -> Any:
    return await mlx_thread.run(ThreadJob(func, on_cancel))


async def inside(work: Work) -> None:
    await until(work.entered.is_set)


async def test_a_function_runs_on_the_mlx_thread_and_its_result_comes_back() -> None:
    assert await run(mlx_thread.is_current) is True
    assert not mlx_thread.is_current()
    assert await run(lambda: threading.current_thread().name) == "mlx"


async def test_all_functions_run_on_one_thread() -> None:
    threads = await asyncio.gather(*(run(threading.get_ident) for _ in range(50)))
    assert len(set(threads)) == 1


async def test_context_variables_of_the_caller_are_seen() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="no")
    variable.set("yes")
    assert await run(variable.get) == "yes"
    await run(lambda: variable.set("changed on the thread"))
    assert variable.get() == "yes"


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), StopIteration(), MemoryError()]
)
async def test_whatever_the_function_raises_reaches_the_caller(error: BaseException) -> None:
    def fail() -> None:
        raise error

    # A StopIteration cannot leave a coroutine; Python makes a RuntimeError of it.
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected) as caught:
        await run(fail)
    assert caught.value is error or caught.value.__cause__ is error
    assert not mlx_thread.locked
    assert await run(lambda: 1) == 1


@pytest.mark.parametrize("cancels", [1, 2, 5])
async def test_lock_is_held_until_the_worker_returns_after_cancels(cancels: int) -> None:
    work = Work()
    task = asyncio.create_task(run(work, work.on_cancel))
    await inside(work)
    for _ in range(cancels):
        task.cancel()
        await turns()
        assert mlx_thread.locked
        assert not task.done()
    assert work.cancels == 1
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.returned.is_set()
    assert not mlx_thread.locked
    assert await run(lambda: "next") == "next"


async def test_the_first_cancellation_is_the_one_that_is_raised() -> None:
    work = Work()
    task = asyncio.create_task(run(work))
    await inside(work)
    task.cancel("first")
    await turns()
    task.cancel("second")
    await turns()
    work.release.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("first",)


async def test_a_second_request_entered_during_the_drain_waits() -> None:
    first, second = Work(), Work()
    task = asyncio.create_task(run(first))
    await inside(first)
    task.cancel()
    await asyncio.sleep(0)
    other = asyncio.create_task(run(second))
    await until(lambda: mlx_thread.waiting == 1)
    assert not second.entered.is_set()
    first.release.set()
    await inside(second)
    assert first.returned.is_set()
    second.release.set()
    assert await other == "done"
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_waiters_are_served_in_order_and_a_cancelled_one_leaves_no_hole() -> None:
    order: list[int] = []
    first = Work()
    holder = asyncio.create_task(run(first))
    await inside(first)
    waiters = [asyncio.create_task(run(lambda i=i: order.append(i))) for i in range(6)]
    await until(lambda: mlx_thread.waiting == 6)
    waiters[0].cancel()
    waiters[3].cancel()
    await asyncio.wait(waiters[:1] + waiters[3:4])
    assert waiters[0].cancelled()
    assert waiters[3].cancelled()
    assert mlx_thread.waiting == 4
    assert mlx_thread.locked
    first.release.set()
    await asyncio.gather(holder, *(w for w in waiters if not w.cancelled()))
    assert order == [1, 2, 4, 5]


async def test_timeout_raises_timeout_error_once_the_worker_is_out() -> None:
    work = Work(obedient=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            expiring = asyncio.create_task(expire(limit, work.entered.is_set))
            await run(work, work.on_cancel)
    await expiring
    assert work.returned.is_set()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_nested_timeouts_that_both_expire_during_the_drain() -> None:
    work = Work()

    async def expire_both() -> None:
        for limit in (inner, outer):
            await expire(limit, work.entered.is_set)
            await until(limit.expired)
            await turns()
        work.release.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as outer:
            async with asyncio.timeout(None) as inner:
                expiring = asyncio.create_task(expire_both())
                await run(work)
    await expiring
    assert work.returned.is_set()
    await asyncio.sleep(0)  # no cancellation is left over


async def test_task_group_sibling_failure_cancels_and_the_error_comes_through() -> None:
    work = Work(obedient=True)

    async def fail() -> None:
        await inside(work)
        raise ValueError("sibling")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(run(work, work.on_cancel))
            group.create_task(fail())
    assert caught.group_contains(ValueError, match="sibling")
    assert work.returned.is_set()


async def test_anyio_scope_cancels_and_the_drain_does_not_turn_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = Work()
    loop: Any = asyncio.get_running_loop()
    rounds = 0
    once = loop._run_once

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        once()

    async def cancel() -> None:
        await inside(work)
        scope.cancel()
        await turns()
        # anyio would have the loop go round and round, thousands of times in this time.
        loop.call_later(0.3, work.release.set)
        monkeypatch.setattr(loop, "_run_once", counted)

    with anyio.CancelScope() as scope:
        cancelling = asyncio.create_task(cancel())
        await run(work, work.on_cancel)
    assert scope.cancelled_caught
    assert work.returned.is_set()
    await cancelling
    assert rounds < 20


async def test_anyio_task_group_cancel() -> None:
    work = Work(obedient=True)
    async with anyio.create_task_group() as group:
        group.start_soon(run, work, work.on_cancel)
        await inside(work)
        group.cancel_scope.cancel()
    assert work.returned.is_set()
    assert not mlx_thread.locked


async def test_native_cancel_during_the_drain_of_an_anyio_cancel_is_not_lost() -> None:
    work = Work()

    async def cancel_both() -> None:
        await inside(work)
        scope.cancel()
        await turns()
        await expire(limit, work.entered.is_set)
        await until(limit.expired)
        await turns()
        work.release.set()

    after_scope = False
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            with anyio.CancelScope() as scope:
                cancelling = asyncio.create_task(cancel_both())
                await run(work)
            after_scope = True
    await cancelling
    assert not after_scope


async def test_cancel_in_the_instant_of_success_is_still_a_cancellation() -> None:
    for _ in range(50):
        work = Work()
        task = asyncio.create_task(run(work))
        await inside(work)
        work.release.set()
        while mlx_thread.locked:  # without giving the loop a chance to hear of the success
            time.sleep(0)  # noqa: ASYNC251
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_cancelled_before_it_ever_ran() -> None:
    task = asyncio.create_task(run(Work()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not mlx_thread.busy


@pytest.mark.parametrize("result", ["value", ValueError("late"), KeyboardInterrupt()])
async def test_outcome_after_a_cancel_is_discarded_without_a_complaint(result: Any) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    work = Work(result=result)
    task = asyncio.create_task(run(work))
    await inside(work)
    task.cancel()
    await asyncio.sleep(0)
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await turns()
    assert not complaints
    assert not other_tasks()


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_on_cancel_that_raises_costs_neither_drain_nor_lock(
    error: type[BaseException],
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def broken() -> None:
        raise error("from on_cancel")

    work = Work()
    task = asyncio.create_task(run(work, broken))
    await inside(work)
    task.cancel("first")
    await turns()
    assert mlx_thread.locked
    work.release.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("first",)
    assert isinstance(complaints[0]["exception"], error)


async def test_entering_from_the_thread_raises_instead_of_deadlocking() -> None:
    loop = asyncio.get_running_loop()

    def nested_loop() -> None:
        asyncio.run(run(lambda: None))

    with pytest.raises(RuntimeError, match="wait for itself for ever"):
        await run(nested_loop)

    def back_to_the_loop() -> Any:
        return asyncio.run_coroutine_threadsafe(run(lambda: None), loop).result(PATIENCE)

    with pytest.raises(RuntimeError, match="wait for itself for ever"):
        await run(back_to_the_loop)
    assert await run(lambda: "free") == "free"


async def test_a_task_made_from_inside_may_enter_once_its_turn_is_over() -> None:
    loop = asyncio.get_running_loop()
    later: asyncio.Future[Any] = loop.create_future()
    gate = asyncio.Event()

    async def follow_up() -> None:
        await gate.wait()
        later.set_result(await run(lambda: "later"))

    tasks: list[asyncio.Task[None]] = []
    await run(
        lambda: loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(follow_up())))
    )
    gate.set()
    assert await asyncio.wait_for(later, PATIENCE) == "later"


async def test_loops_in_several_threads_share_the_thread_one_at_a_time() -> None:
    running = 0
    most = 0

    def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1

    def loop_in_thread() -> None:
        async def main() -> None:
            await asyncio.gather(*(run(count) for _ in range(10)))

        asyncio.run(main())

    threads = [threading.Thread(target=loop_in_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(run(count) for _ in range(10)))
    await until(lambda: not any(thread.is_alive() for thread in threads))
    assert most == 1


async def test_turns_of_other_loops_are_served_in_the_order_of_arrival() -> None:
    order: list[str] = []
    first = Work()
    holder = asyncio.create_task(run(first))
    await inside(first)
    mine = asyncio.create_task(run(lambda: order.append("mine")))
    await until(lambda: mlx_thread.waiting == 1)
    thread = threading.Thread(target=lambda: asyncio.run(run(lambda: order.append("other"))))
    thread.start()
    await until(lambda: mlx_thread.waiting == 2)
    last = asyncio.create_task(run(lambda: order.append("last")))
    await until(lambda: mlx_thread.waiting == 3)
    first.release.set()
    await asyncio.gather(holder, mine, last)
    thread.join(PATIENCE)
    assert order == ["mine", "other", "last"]


def test_a_loop_that_dies_neither_frees_the_lock_early_nor_keeps_it() -> None:
    """Loop stopped and closed with a turn inside and one waiting: no cancel, no drain."""
    running, waiting = Work(), Work()
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(run(running)), loop.create_task(run(waiting))]
    loop.run_until_complete(inside(running))
    for task in tasks:
        # The loop will never do it, and says so when the tasks are collected.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    del tasks, task
    gc.collect()
    assert mlx_thread.locked, "the worker is still inside"
    running.release.set()
    assert asyncio.run(run(lambda: "free")) == "free"
    assert not waiting.entered.is_set()


def test_asyncio_run_again_and_again() -> None:
    threads = {asyncio.run(run(threading.get_ident)) for _ in range(5)}
    assert len(threads) == 1


def test_loop_shutdown_cancels_and_waits() -> None:
    work = Work(obedient=True)

    async def main() -> None:
        asyncio.create_task(run(work, work.on_cancel))  # noqa: RUF006
        await inside(work)

    asyncio.run(main())
    assert work.returned.is_set()
    assert not mlx_thread.locked


async def test_abort_tells_a_waiting_and_a_running_caller() -> None:
    work = Work(obedient=True)
    running = ThreadJob(work, work.on_cancel)
    waiting = ThreadJob(lambda: None)
    tasks = [asyncio.create_task(mlx_thread.run(turn)) for turn in (running, waiting)]
    await inside(work)
    mlx_thread.abort(waiting, LookupError("waiting"))
    with pytest.raises(LookupError, match="waiting"):
        await tasks[1]
    assert mlx_thread.locked
    assert not mlx_thread.expire(running, LookupError("too late"))
    await asyncio.to_thread(mlx_thread.abort, running, LookupError("running"))
    with pytest.raises(LookupError, match="running"):
        await tasks[0]
    assert work.returned.is_set()
    mlx_thread.abort(running, LookupError("over already"))


async def test_on_done_is_called_once_however_the_turn_ends() -> None:
    ended: list[str] = []
    work = Work()
    holder = asyncio.create_task(
        mlx_thread.run(ThreadJob(work, None, lambda _: ended.append("finished")))
    )
    await inside(work)
    waiting = asyncio.create_task(
        mlx_thread.run(ThreadJob(work, None, lambda _: ended.append("withdrawn")))
    )
    await until(lambda: mlx_thread.waiting == 1)
    waiting.cancel()
    await asyncio.wait({waiting})
    work.release.set()
    await holder
    await run(lambda: None)
    assert ended == ["withdrawn", "finished"]


async def test_what_a_turn_held_is_dropped_when_it_is_over() -> None:
    class Big:
        pass

    import weakref

    big = Big()
    alive = weakref.ref(big)
    assert await run(lambda held=big: None) is None
    task = asyncio.create_task(run(lambda held=big: held))
    task.cancel()
    await asyncio.wait({task})
    del big, task
    gc.collect()
    assert alive() is None


async def test_if_the_thread_dies_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    class Fatal(ThreadJob[None]):
        def execute(self) -> None:
            self.stage = Stage.DONE
            self.announce()
            release.wait(PATIENCE)
            raise SystemExit

    release = threading.Event()
    thread = MLXThread()
    await thread.run(Fatal(lambda: None))
    waiting = asyncio.create_task(thread.run(ThreadJob(lambda: None)))
    await until(lambda: thread.waiting == 1)
    release.set()
    with pytest.raises(EngineDead, match="has ended"):
        await waiting
    with pytest.raises(EngineDead, match="has ended"):
        await thread.run(ThreadJob(lambda: None))
    assert thread._thread is not None
    thread._thread.join(PATIENCE)


async def test_if_the_thread_dies_inside_a_turn_its_caller_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fatal(ThreadJob[None]):
        def execute(self) -> None:
            raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread = MLXThread()
    with pytest.raises(EngineDead, match="has ended"):
        await thread.run(Fatal(lambda: None))
    assert not thread.locked
    assert thread._thread is not None
    thread._thread.join(PATIENCE)


async def test_a_thread_that_could_not_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = MLXThread()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", cannot)
        with pytest.raises(EngineDead, match="can't start new thread: the limit of memory"):
            await thread.run(ThreadJob(lambda: None))
    assert await thread.run(ThreadJob(lambda: "works")) == "works"
    await asyncio.to_thread(thread._close)


async def test_a_turn_aborted_on_its_way_into_the_queue_never_runs() -> None:
    turn = ThreadJob(lambda: "ran")
    mlx_thread.abort(turn, LookupError("aborted"))
    with pytest.raises(LookupError, match="aborted"):
        await mlx_thread.run(turn)
    assert mlx_thread.waiting == 0


async def test_nothing_of_a_turn_stays_without_the_garbage_collector() -> None:
    class Big:
        pass

    import weakref

    gc.collect()
    gc.disable()
    try:
        big = Big()
        alive = weakref.ref(big)
        turn = ThreadJob(lambda: None, lambda held=big: None)
        kept = weakref.ref(turn)
        await mlx_thread.run(turn)
        del big, turn
        # The thread lets go of it a moment after it has told of the end.
        await until(lambda: alive() is None and kept() is None)
    finally:
        gc.enable()


async def test_a_fresh_thread_object_ends_cleanly() -> None:
    thread = MLXThread()
    jobs: list[str] = []
    thread.at_exit(lambda: jobs.append("first added, last run"))
    thread.at_exit(lambda: jobs.append("last added, first run"))
    work = Work(obedient=True)
    running = asyncio.create_task(thread.run(ThreadJob(work, work.on_cancel)))
    await inside(work)
    waiting = asyncio.create_task(thread.run(ThreadJob(lambda: None)))
    await until(lambda: thread.waiting == 1)
    await asyncio.to_thread(thread._close)
    for task in (running, waiting):
        with pytest.raises(Exception, match="shutting down"):
            await task
    with pytest.raises(Exception, match="shutting down"):
        await thread.run(ThreadJob(lambda: None))
    assert jobs == ["last added, first run", "first added, last run"]
