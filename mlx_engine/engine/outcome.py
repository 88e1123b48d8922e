"""The outcome of one of many requests, and what is told on the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mlx_engine.errors import MLXEngineError
from mlx_engine.outputs import GenerationResult

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[K]):
    """Outcome of one item of ``engine.map``: its answer, or the error with which it failed.

    Attributes:
        id: of the item.
        index: of the item among all, from 0.
        result: the answer; ``None`` if there is an error. One that was cut by its ``timeout`` is
            an answer, with the finish reason ``timeout``.
        error: why there is no answer; ``None`` if there is one.
        attempts: how often it was tried.
    """

    id: K
    index: int
    result: GenerationResult | None = None
    error: MLXEngineError | None = None
    attempts: int = 1

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None

    def unwrap(self) -> GenerationResult:
        """The answer; raises the error if there is none."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        assert self.result is not None
        return self.result


@dataclass(frozen=True, slots=True)
class Job(Generic[K]):
    """An item on its way to its outcome."""

    id: K
    index: int
    item: Any


class LastOutcome(Exception):
    """An outcome after which no other item is to be taken up: raised instead of returning it.

    Attributes:
        outcome: the last one.
        error: what ends it all.
    """

    def __init__(self, outcome: Outcome[Any], error: MLXEngineError) -> None:
        super().__init__()
        self.outcome, self.error = outcome, error
