"""Outcomes of many requests, as they come: what ``engine.map`` gives."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import ClassVar, Generic

from mlx_engine.core.drain import clean_up, is_destroyed, wait_shielded
from mlx_engine.core.wakeup import running_loop
from mlx_engine.engine.outcome import Job, K, LastOutcome, Outcome
from mlx_engine.errors import MLXEngineError, another
from mlx_engine.other_attributes import AsyncOnly

_WINDOW = 4  # outcomes that may be under way or unread, for each request under way


Take = Callable[[], Awaitable[Job[K] | None]]
Do = Callable[[Job[K]], Awaitable[Outcome[K]]]


class Outcomes(AsyncOnly, Generic[K]):
    """Outcomes of ``engine.map``, as an async iterator of ``Outcome``.

        async with engine.map(prompts, concurrency=8) as outcomes:
            async for outcome in outcomes:
                print(outcome.id, outcome.unwrap().text)

    Work begins when it is entered or first read. Leave it with ``async with`` or ``aclose()``:
    what is under way is cancelled, and is out of MLX by then. A bare ``async for`` may be left
    with ``break`` too, which cancels the same, and does not wait for it.

    Items are taken up one by one, and no further than four times ``concurrency`` ahead of what is
    read here: who reads nothing holds everything up, and an endless iterator takes no memory.

    Cancellation: when the task that waits here is cancelled, all that is under way is cancelled;
    ``CancelledError`` is raised when it is out of MLX. What is done is kept, in ``unread``.
    """

    _reading: ClassVar = (
        "engine.map(...) is not awaited: write 'async for outcome in engine.map(...)', or "
        "'results = [outcome async for outcome in engine.map(...)]'"
    )

    def __init__(
        self,
        begin: Callable[[], tuple[Take[K], Do[K], Callable[[], None]]],
        concurrency: int,
        *,
        ordered: bool,
        total: int | None = None,
    ) -> None:
        """Make one that is not begun.

        Args:
            begin: called in the event loop; gives what takes the next item, what makes its outcome
                of it, and what is told that there is one.
            concurrency: items under way at a time.
            ordered: whether outcomes come in the order of the items.
            total: how many items there are; ``None`` if nobody knows.
        """
        self._run = _Run[K](begin, concurrency, ordered, total)

    @property
    def unread(self) -> list[Outcome[K]]:
        """Outcomes that are there and were not read: after a cancellation, say. They can be read
        with ``async for`` as well.
        """
        return self._run.unread()

    def cancel(self) -> None:
        """Cancel what is under way, and take up nothing more. From any thread; returns at once.

        Who reads gets what is done by then, and then the end.
        """
        self._run.cancel()

    async def aclose(self) -> None:
        """Cancel what is under way, and wait until it is out of MLX. Any number of times.

        Cancellation does not cut the wait short; ``CancelledError`` is raised after it.
        """
        await self._run.close()

    async def __aenter__(self) -> Outcomes[K]:
        self._run.begin()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        home = self._run.loop
        if is_destroyed(exc, home):
            self.cancel()
        await clean_up(exc, self.aclose, home)

    def __aiter__(self) -> Outcomes[K]:
        return self

    async def __anext__(self) -> Outcome[K]:
        """The next outcome.

        Raises:
            StopAsyncIteration: there are no more.
            EngineNotRunning: the engine takes no requests any more; what was under way has said
                so, and other items were not taken up.
            Exception: whatever the iterator of items raises, once what was under way is over.
        """
        run = self._run
        run.begin()
        try:
            return await run.next()
        except asyncio.CancelledError as cancelled:
            await clean_up(cancelled, self.aclose)
            raise

    def __del__(self) -> None:
        if (run := getattr(self, "_run", None)) is not None:
            run.cancel()


class _Run(Generic[K]):
    """The work behind outcomes: its tasks know it, and not those, which must become garbage.

    Attributes:
        loop: in which it was begun.
    """

    def __init__(
        self,
        begin: Callable[[], tuple[Take[K], Do[K], Callable[[], None]]],
        concurrency: int,
        ordered: bool,
        total: int | None,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._begin = begin
        self._concurrency = concurrency
        self._ordered = ordered
        self._left = total  # items without an outcome, if their number is known
        self._workers: list[asyncio.Task[None]] = []
        self._working = 0  # of these, until it is known how they ended
        self._places = asyncio.Semaphore(_WINDOW * concurrency)
        self._intake = asyncio.Lock()
        self._changed = asyncio.Event()
        self._ended = False  # no item is taken up any more
        self._next_index = 0
        self._early: dict[int, Outcome[K]] = {}  # if ordered: those whose turn has not come
        self._ready: deque[Outcome[K]] = deque()
        self._failure: BaseException | None = None
        self._gone: MLXEngineError | None = None  # why items were left: the engine is gone

    def begin(self) -> None:
        """Begin, the first time, in the running event loop."""
        if self.loop is not None:
            return
        self.loop = running_loop()
        if self._ended:
            return
        self._take, self._do, self._tell = self._begin()
        if self._concurrency:  # there are items
            self._add_worker()

    def unread(self) -> list[Outcome[K]]:
        """Outcomes that are there, in order."""
        early = (self._early[index] for index in sorted(self._early))
        return [*self._ready, *early]

    async def next(self) -> Outcome[K]:
        """The next outcome; see ``Outcomes.__anext__``."""
        while True:
            self._changed.clear()
            over = not self._working
            if over and self._early:  # those before them were cancelled
                self._ready.extend(self._early.pop(index) for index in sorted(self._early))
            if self._ready:
                self._places.release()
                return self._ready.popleft()
            if over:
                failure = self._failure or (self._gone if self._left != 0 else None)
                self._failure = self._gone = None
                if failure is None:
                    await asyncio.sleep(0)  # who is told of progress hears of the last one first
                    raise StopAsyncIteration
                try:
                    raise failure
                finally:
                    del failure  # no cycle from its traceback to this frame
            await self._changed.wait()

    def cancel(self) -> None:
        """Cancel all of it. From any thread."""
        self._ended = True
        loop = self.loop
        if loop is None or all(worker.done() for worker in self._workers):
            return
        try:
            loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:
            pass  # the loop is closed

    async def close(self) -> None:
        """Cancel all of it, and wait until it is over."""
        self._ended = True
        if all(worker.done() for worker in self._workers):
            return
        if self.loop is not running_loop():
            self.cancel()
            raise RuntimeError(
                "outcomes are closed in the event loop in which they were begun; they have been "
                "cancelled, which works from everywhere"
            )
        self._cancel()
        await wait_shielded(asyncio.gather(*self._workers, return_exceptions=True))

    def _cancel(self) -> None:
        for worker in self._workers:
            worker.cancel()

    def _add_worker(self) -> None:
        assert self.loop is not None
        worker = self.loop.create_task(self._work())
        worker.add_done_callback(self._worker_ended)
        self._workers.append(worker)
        self._working += 1

    async def _work(self) -> None:
        is_new = True
        while (job := await self._next_job()) is not None:
            # As many as there are items, if that is less: nobody knows how many there are.
            if is_new and len(self._workers) < self._concurrency and not self._ended:
                self._add_worker()
            is_new = False
            try:
                outcome = await self._do(job)
            except LastOutcome as last:
                outcome, self._ended = last.outcome, True
                self._gone = self._gone or another(last.error)
            self._put(outcome)

    async def _next_job(self) -> Job[K] | None:
        await self._places.acquire()
        async with self._intake:
            job = None if self._ended else await self._take_one()
        if job is None:
            self._ended = True
            self._places.release()  # for another worker, that it may end as well
        return job

    async def _take_one(self) -> Job[K] | None:
        try:
            return await self._take()
        except Exception as error:  # noqa: BLE001 - the border: code of the caller's
            self._failure = self._failure or error
            return None

    def _put(self, outcome: Outcome[K]) -> None:
        if self._left is not None:
            self._left -= 1
        if self._ordered:
            self._early[outcome.index] = outcome
            while (following := self._early.pop(self._next_index, None)) is not None:
                self._ready.append(following)
                self._next_index += 1
        else:
            self._ready.append(outcome)
        self._tell()
        self._changed.set()

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        """Tell who reads; what is no end of ours, a bug or a foreign cancel, ends all."""
        self._working -= 1
        foreign = worker.cancelled() and not self._ended
        error = asyncio.CancelledError() if foreign else None
        if not worker.cancelled():
            error = worker.exception()  # type: ignore[assignment]
        if error is not None:
            self._failure = self._failure or error
            self._ended = True
            self._cancel()
        self._changed.set()
