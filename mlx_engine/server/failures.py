"""Failures as clients are told of them: what kind of failure is which status."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlx_engine.errors import (
    ContextLengthExceeded,
    EngineBusy,
    EngineNotRunning,
    InvalidRequest,
    MLXEngineError,
)

Kind = Literal[
    "invalid",  # it can never work as it is
    "context",  # the prompt is too long; clients shorten it
    "key",  # no key, or one that is not known
    "forbidden",  # not from there
    "not_found",  # no such model
    "path",  # no such path
    "method",
    "slow",  # the body did not come
    "too_large",
    "busy",  # come again
    "unavailable",  # the engine is being started, stopped or is gone
    "failed",  # this request failed; others go on
]

STATUS: dict[Kind, int] = {
    "invalid": 400,
    "context": 400,
    "key": 401,
    "forbidden": 403,
    "not_found": 404,
    "path": 404,
    "method": 405,
    "slow": 408,
    "too_large": 413,
    "busy": 429,
    "unavailable": 503,
    "failed": 500,
}

# The first that fits. What is not here is no error of the library.
_KINDS: tuple[tuple[type[MLXEngineError], Kind], ...] = (
    (ContextLengthExceeded, "context"),
    (InvalidRequest, "invalid"),
    (EngineBusy, "busy"),
    (EngineNotRunning, "unavailable"),
    (MLXEngineError, "failed"),
)
_RESTART = 2.0  # seconds after which an engine that is gone may be there again


@dataclass
class Failure(Exception):
    """A request that gets an error in the place of its answer.

    Attributes:
        kind: of which the status follows.
        message: for the client's user.
        option: the field that is to blame; ``None`` if none is.
        retry_after: seconds after which it may go better.
        prompt_tokens, context_length: of a prompt that is too long, as far as they are known.
    """

    kind: Kind
    message: str
    option: str | None = None
    retry_after: float | None = None
    prompt_tokens: int | None = None
    context_length: int | None = None

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.kind]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that belong to it."""
        if self.retry_after is None:
            return []
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after))).encode())]

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that an error is; one that nobody has thought of tells nothing of itself."""
        if isinstance(error, Failure):
            return error
        kind = next((kind for of, kind in _KINDS if isinstance(error, of)), None)
        if kind is None:
            return cls("failed", "the server has failed; its log tells more")
        return cls(
            kind,
            str(error),
            option=getattr(error, "option", None),
            retry_after=_RESTART if kind == "unavailable" else getattr(error, "retry_after", None),
            prompt_tokens=getattr(error, "prompt_tokens", None),
            context_length=getattr(error, "context_length", None),
        )
