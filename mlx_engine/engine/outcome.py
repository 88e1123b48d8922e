"""The outcome of one of many requests, and what is told on the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from mlx_engine.errors import MLXEngineError
from mlx_engine.other_attributes import WithAdvice
from mlx_engine.outputs import GenerationResult
from mlx_engine.plain import plain

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # every type checker knows it; Python's, with 3.13

    K = TypeVar("K", default=Any)
else:
    from typing import TypeVar

    K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Outcome(WithAdvice, Generic[K]):
    """Outcome of one item of ``engine.map``: its answer, or the error with which it failed.

    Attributes:
        id: of the item.
        index: of the item among all, from 0.
        result: the answer; ``None`` if there is an error. One that was cut by its ``timeout`` is
            an answer, with the finish reason ``timeout``.
        error: why there is no answer; ``None`` if there is one. For type checkers, ask
            ``if outcome.result is not None`` rather than ``ok``.
        attempts: how often it was tried.
    """

    _parts: ClassVar = {"result": GenerationResult}

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

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """The outcome as plain data, all of which JSON has a form for if it has one for the id.

        Args:
            tokens: whether the ids of the answer's tokens are in it.

        Returns:
            ``id``, ``index``, ``attempts``, ``result`` (as by its own ``to_dict``) and ``error``
            (``type``, ``message`` and ``retryable``), one of which is ``None``.
        """
        error = self.error
        told = None
        if error is not None:
            kind = type(error).__name__
            told = {"type": kind, "message": str(error), "retryable": error.retryable}
        return {
            "id": plain(self.id),
            "index": self.index,
            "attempts": self.attempts,
            "result": None if self.result is None else self.result.to_dict(tokens),
            "error": told,
        }


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
