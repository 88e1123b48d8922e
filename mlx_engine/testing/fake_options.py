"""Options of a ``FakeEngine``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypedDict

from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import ProgressCallback
from mlx_engine.testing.fake_gate import Gate

LoadPiece = Gate | Exception
Load = LoadPiece | Sequence[object] | Iterator[object]


class FakeOptions(TypedDict, total=False):
    """Keyword arguments of ``FakeEngine``, which explains them."""

    max_batch_size: int | None
    seconds_per_token: float
    prefill_seconds: float
    load_seconds: float
    load: Load
    model: str
    supports_tools: bool
    supports_reasoning: bool
    context_length: int | None
    queue_limit: int | None
    max_wait: float | None
    memory: int | float | str
    limits: RequestLimits
    on_progress: ProgressCallback | None


DEFAULTS: Final[FakeOptions] = {
    "max_batch_size": None,
    "seconds_per_token": 0.0,
    "prefill_seconds": 0.0,
    "load_seconds": 0.0,
    "load": (),
    "model": "fake",
    "supports_tools": True,
    "supports_reasoning": True,
    "context_length": None,
    "queue_limit": None,
    "max_wait": None,
    "memory": "auto",
    "limits": DEFAULT_LIMITS,
    "on_progress": None,
}
