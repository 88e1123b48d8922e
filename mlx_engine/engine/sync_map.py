"""Many prompts by one call, without ``await``."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Self, Unpack, overload

from mlx_engine.engine.interface import Engine
from mlx_engine.engine.outcome import K, Outcome
from mlx_engine.engine.outcomes import Outcomes
from mlx_engine.engine.sync_front import BlockingIterator, E_co, Front, without_await
from mlx_engine.params import SamplingParams
from mlx_engine.requests import ChatRequestOptions, Prompt


class SyncOutcomes(Generic[K]):
    """Outcomes of ``map`` without ``await``: an iterator of ``Outcome``.

        with llm.map(prompts, concurrency=8) as outcomes:
            for outcome in outcomes:
                print(outcome.id, outcome.unwrap().text)

    Cancellation: Ctrl-C while it is read cancels what is under way; ``KeyboardInterrupt`` is raised
    once that has left MLX, and what is done is kept, in ``unread``. All else is as in ``Outcomes``.
    """

    def __init__(self, outcomes: Outcomes[K], front: Front[Engine]) -> None:
        self._outcomes = outcomes
        self._front = front

    @property
    def unread(self) -> list[Outcome[K]]:
        """Outcomes that are there and were not read. See ``Outcomes``."""
        return self._outcomes.unread

    def cancel(self) -> None:
        """Cancel what is under way, from any thread; returns at once. See ``Outcomes``."""
        self._outcomes.cancel()

    def close(self) -> None:
        """Cancel what is under way, and wait until it is out of MLX. Any number of times."""
        self._front.run(self._outcomes.aclose)

    def __iter__(self) -> Iterator[Outcome[K]]:
        return BlockingIterator(self._outcomes, self._front)

    def __next__(self) -> Outcome[K]:
        return next(BlockingIterator(self._outcomes, self._front))

    def __enter__(self) -> Self:
        self._front.run(self._outcomes.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._front.run(self._outcomes.__aexit__, exc_type, exc, traceback)


class MapFront(Front[E_co]):
    """The part of ``SyncEngine`` that takes many prompts or conversations at once."""

    # The same as in ``MapEngine``: what is overloaded cannot be carried over by a function.
    @overload
    def map(  # type: ignore[overload-overlap]
        self,
        prompts: Mapping[K, Prompt],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> SyncOutcomes[K]: ...

    @overload
    def map(  # type: ignore[overload-overlap]
        self,
        prompts: Iterable[tuple[K, Prompt]] | AsyncIterable[tuple[K, Prompt]],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> SyncOutcomes[K]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        params: SamplingParams | None = None,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        retries: int = 0,
        **options: Unpack[ChatRequestOptions],
    ) -> SyncOutcomes[int]: ...

    def map(self, prompts: Any, *args: Any, **options: Any) -> SyncOutcomes[Any]:
        """See ``Engine``."""
        return SyncOutcomes(self.engine.map(prompts, *args, **options), self)


_SHOWN = inspect.signature(Engine.map).replace(return_annotation="SyncOutcomes[Any]")
MapFront.map.__doc__ = without_await(Engine.map.__doc__)
MapFront.map.__signature__ = _SHOWN  # type: ignore[attr-defined]
