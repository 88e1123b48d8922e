"""SIGTERM and Ctrl-C for programs that serve: the first one drains, the second one aborts."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from mlx_engine.core.lifecycle import checked_timeout
from mlx_engine.core.wakeup import running_loop

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_log = logging.getLogger("mlx_engine.remote")


class Drains(Protocol[T_co]):
    """Anything that can be shut down: an engine, a host, a manager."""

    def shutdown(self, timeout: float | None) -> Awaitable[T_co]:
        """Let what is in flight finish for so many seconds, and abort the rest."""


class SignalHandlers(Generic[T]):
    """Handlers of signals; as a context manager they remove themselves.

    Attributes:
        received: the first signal that came; ``None`` as long as none has.
    """

    def __init__(
        self, engine: Drains[T], timeout: float | None, signals: Sequence[signal.Signals]
    ) -> None:
        self.received: signal.Signals | None = None
        self._engine = engine
        self._timeout = timeout
        self._loop = running_loop()
        self._before: dict[signal.Signals, Any] = {}
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._shutdowns: list[asyncio.Task[T]] = []
        self._waiting = 0
        try:
            for number in signals:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:  # nohup, or a shell's background job
                    self._loop.add_signal_handler(number, self._take, number)
                    self._before[number] = before
        except BaseException:
            self.remove()
            raise

    async def wait(self) -> T:
        """Wait for a signal, and until the shutdown that it began is over.

        Returns:
            What ``shutdown`` returned: an engine's report on what has finished.

        Cancellation: ends the waiting, not the shutdown.

        Raises:
            BaseException: whatever ``shutdown`` raised.
        """
        self._waiting += 1
        try:
            await asyncio.wait({self._first})
            while not all(task.done() for task in self._shutdowns):
                await asyncio.wait(set(self._shutdowns))
        finally:
            self._waiting -= 1
        outcomes = [task.result() for task in self._shutdowns]
        return outcomes[0]

    def remove(self) -> None:
        """Let signals do what they did before. Any number of times."""
        while self._before:
            number, before = self._before.popitem()
            self._loop.remove_signal_handler(number)
            # None: it was set by native code, and cannot be set from here.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _take(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self._shut_down(self._timeout)
            self._first.set_result(None)
        else:
            self._shut_down(0)
            self.remove()

    def _shut_down(self, timeout: float | None) -> None:
        task = self._loop.create_task(self._shutdown(timeout))
        self._shutdowns.append(task)
        task.add_done_callback(self._over)

    async def _shutdown(self, timeout: float | None) -> T:
        return await self._engine.shutdown(timeout)

    def _over(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._waiting:
            _log.error("the shutdown that a signal began has failed", exc_info=error)


def install_signal_handlers(
    engine: Drains[T],
    *,
    timeout: float | None = 30.0,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> SignalHandlers[T]:
    """Have the first signal drain ``engine``, and the second one abort what is left.

    From then on signals do again what they did before, so that a third one ends even a program
    that is stuck. A signal that the parent process had ignored stays ignored. An application's
    main may look like this::

        async def main() -> None:
            engine = BatchedEngine("demo")
            with install_signal_handlers(engine, timeout=30) as handlers:
                async with engine:  # a signal while it loads: EngineStopped
                    serving = asyncio.create_task(serve(engine))
                    report = await handlers.wait()
                    serving.cancel()
            print(f"{len(report.finished)} requests finished, {len(report.aborted)} did not")

        asyncio.run(main())

    Args:
        engine: anything with ``shutdown(timeout)``.
        timeout: seconds that requests in flight may take after the first signal; ``None``
            waits for all of them.
        signals: which ones.

    Handlers that ``loop.add_signal_handler`` had set before are not restored; those of
    ``signal.signal`` are.

    Raises:
        InvalidRequest: ``timeout`` is not such a number.
        RuntimeError: this is not the main thread, or no event loop runs in it.
    """
    checked_timeout(timeout)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "signals arrive in the main thread: call install_signal_handlers() there, in its "
            "event loop; from another one, call engine.shutdown() yourself"
        )
    return SignalHandlers(engine, timeout, signals)
