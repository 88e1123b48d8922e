"""The ways in which asyncio code is cancelled, each of which can strike at any moment."""

from __future__ import annotations

import abc
import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Generic, TypeVar

import anyio

T = TypeVar("T")

Work = Callable[[], Coroutine[Any, Any, T]]


class Way(abc.ABC, Generic[T]):
    """Runs an operation, and cancels it when told to. Used once.

    Attributes:
        name: what it is called in reports.
        repeats: whether it strikes again and again until the operation is over.
        struck: whether it has struck, while the operation was under way.
    """

    name: ClassVar[str]
    repeats: ClassVar[bool] = False

    def __init__(self) -> None:
        self.struck = False
        self._inner: asyncio.Task[Any] | None = None

    @abc.abstractmethod
    async def run(self, operation: Work[T]) -> T | None:
        """Run the operation to its end, and make good for this way's own part in it.

        Returns:
            What the operation gave; ``None`` if it was cancelled.

        Raises:
            Dishonest: the operation was cancelled and did not say so, or said so and was not.
            Exception: what the operation raised.
        """

    def strike(self) -> None:
        """Cancel it now. In its event loop's thread; nothing happens once it is over."""
        if self._over:
            return
        self.struck = True
        self._strike()

    def forget(self) -> None:
        """Let go of the operation's task, whose error holds what it held."""
        self._inner = None

    @abc.abstractmethod
    def _strike(self) -> None: ...

    @property
    def _over(self) -> bool:
        return self._inner is None or self._inner.done()


class Dishonest(AssertionError):
    """A cancelled operation gave a result, or one that was not cancelled said it was."""


class CancelOnce(Way[T]):
    """``task.cancel()``."""

    name = "Task.cancel"

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        task = self._inner = asyncio.ensure_future(_call(operation))
        # Not "await task": whoever cancels this one, at the end of the event loop say, is
        # not to cancel that one a second time.
        await _until_done(task)
        if self.struck != task.cancelled():
            if self.struck and task.exception() is not None:
                task.result()
            raise Dishonest(f"struck: {self.struck}, cancelled: {task.cancelled()}")
        return None if self.struck else task.result()

    def _strike(self) -> None:
        assert self._inner is not None
        self._inner.cancel("the first")


class CancelTwice(CancelOnce[T]):
    """``task.cancel()`` twice, with nothing in between."""

    name = "Task.cancel twice"

    def _strike(self) -> None:
        assert self._inner is not None
        self._inner.cancel("the first")
        self._inner.cancel("the second")


class CancelAgainAndAgain(CancelOnce[T]):
    """``task.cancel()`` at every step until the task is over."""

    name = "Task.cancel at every step"
    repeats = True


class Timeout(Way[T]):
    """``asyncio.timeout()``."""

    name = "asyncio.timeout"

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        self._inner = asyncio.current_task()
        try:
            async with asyncio.timeout(None) as self._timeout:
                result = await operation()
        except TimeoutError:
            if not self.struck:
                raise
            return None
        finally:
            self._inner = None
        if self._timeout.expired():
            raise Dishonest("asyncio.timeout has expired, and did not raise")
        return result

    def _strike(self) -> None:
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())


class _Sibling(Exception):
    """The error of a task group's failing member."""


class TaskGroup(Way[T]):
    """A sibling in an ``asyncio.TaskGroup`` fails."""

    name = "TaskGroup"

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        self._fuse: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.TaskGroup() as group:
                self._inner = group.create_task(_call(operation))
                sibling = group.create_task(_fail_after(self._fuse))
                await asyncio.wait({self._inner, sibling}, return_when=asyncio.FIRST_COMPLETED)
                if not self.struck:
                    self._fuse.set_result(None)
        except* _Sibling:
            pass
        assert self._inner is not None
        return None if self._inner.cancelled() else self._inner.result()

    def _strike(self) -> None:
        if not self._fuse.done():
            self._fuse.set_result(None)


class MoveOnAfter(Way[T]):
    """``anyio.move_on_after()``, as ``anyio.fail_after()``: cancels level-triggered."""

    name = "anyio.move_on_after"

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        self._inner, result = asyncio.current_task(), None
        with anyio.move_on_after(math.inf) as self._scope:
            try:
                result = await operation()
            finally:
                self._inner = None
            return result
        return None

    def _strike(self) -> None:
        self._scope.deadline = asyncio.get_running_loop().time()


class AnyioGroup(Way[T]):
    """The scope of an anyio task group is cancelled, as web frameworks do at a disconnect."""

    name = "anyio task group"

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        results: list[T] = []

        async def child() -> None:
            self._inner = asyncio.current_task()
            try:
                results.append(await operation())
            finally:
                self._inner = None

        try:
            async with anyio.create_task_group() as self._group:
                self._group.start_soon(child)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return results[0] if results else None

    def _strike(self) -> None:
        self._group.cancel_scope.cancel()


class LoopShutdown(Way[T]):
    """The event loop ends as ``asyncio.run`` ends it: whoever runs it then cancels all tasks."""

    name = "loop shutdown"
    closes: ClassVar[bool] = False

    async def run(self, operation: Work[T]) -> T | None:
        """See ``Way``."""
        self._inner = asyncio.current_task()
        try:
            return await operation()
        finally:
            self._inner = None

    def _strike(self) -> None:
        asyncio.get_running_loop().stop()


class LoopClosed(LoopShutdown[T]):
    """The event loop is stopped and closed: nobody in it is ever told anything."""

    name = "loop closed"
    closes = True


ALL_WAYS: tuple[type[Way[Any]], ...] = (
    CancelOnce,
    CancelTwice,
    CancelAgainAndAgain,
    Timeout,
    TaskGroup,
    MoveOnAfter,
    AnyioGroup,
    LoopShutdown,
    LoopClosed,
)


async def _call(operation: Work[T]) -> T:
    return await operation()


async def _fail_after(fuse: asyncio.Future[None]) -> None:
    await fuse
    raise _Sibling


async def _until_done(task: asyncio.Task[Any]) -> None:
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
