"""The thread of engines without ``await``: what is awaited for those who block."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Generic, ParamSpec

from mlx_engine.core.loop_thread import LoopThread
from mlx_engine.engine.interface import Engine
from mlx_engine.other_attributes import WithAdvice
from mlx_engine.outputs import EngineState

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # every type checker knows it; Python's, with 3.13

    E_co = TypeVar("E_co", bound=Engine, covariant=True, default=Engine)
else:
    from typing import TypeVar

    E_co = TypeVar("E_co", bound=Engine, covariant=True)

P = ParamSpec("P")
T = TypeVar("T")

_AT_REST = (EngineState.CREATED, EngineState.STOPPED)


class Front(WithAdvice, Generic[E_co]):
    """An engine, and an event loop on a thread of its own in which it is awaited.

    Attributes:
        engine: that.
    """

    _advice: ClassVar = dict.fromkeys(
        ("check_health", "replicas", "pid", "limits"),
        "what is not awaited is an attribute of the engine: see engine",
    )

    def __init__(self, engine: E_co) -> None:
        """Make one of any engine; ``engine.sync()`` does that."""
        self.engine = engine
        self._thread = LoopThread("mlx-engine sync", lambda: engine.state in _AT_REST)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.engine!r}>"

    def run(self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await what ``func`` gives, in this event loop, and block until it is there.

            llm.run(llm.engine.wait_exit)

        For coroutine functions of your own, and methods that only some engines have.
        """
        return self._thread.call(functools.partial(func, *args, **kwargs))

    def cancel(self) -> None:
        """Cancel the calls that block in other threads now. From any thread; returns at once.

        Each raises ``concurrent.futures.CancelledError`` when its work has left MLX.
        """
        self._thread.cancel()

    def close(self) -> None:
        """End the thread of this front, and the calls and streams in it; the engine goes on.

        Only of use where others have started the engine: else its own end does that.
        """
        self._thread.close()


def without_await(docstring: str | None) -> str:
    """The docstring of an engine's method for who does not await it."""
    text = docstring or ""
    for old, new in _WORDS:
        text = text.replace(old, new)
    return text


_WORDS = (
    ("await engine.", "llm."),
    ("async with engine.", "with llm."),
    ("async for ", "for "),
    ("An async iterator", "An iterator"),
)


class BlockingIterator(Iterator[T]):
    """An asynchronous iterator, for each of whose values its reader blocks."""

    def __init__(self, values: AsyncIterator[T], front: Front[Engine]) -> None:
        self._values = values
        self._front = front

    def __next__(self) -> T:
        for value in self._front.run(self._next):
            return value
        raise StopIteration

    async def _next(self) -> list[T]:
        """One, or none at the end."""
        try:
            return [await anext(self._values)]
        except StopAsyncIteration:
            return []
