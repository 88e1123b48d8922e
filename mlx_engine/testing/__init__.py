"""For the tests of applications that use this library. Nothing here needs MLX."""

from mlx_engine.testing.fake import FakeEngine
from mlx_engine.testing.fake_answer import FakeAnswer
from mlx_engine.testing.fake_gate import Gate
from mlx_engine.testing.fake_request import FakeRequest
from mlx_engine.testing.safety.check import assert_cancellation_safe
from mlx_engine.testing.safety.report import (
    NotCancellationSafe,
    SafetyFailure,
    SafetyReport,
    SafetyRow,
)

__all__ = [
    "FakeAnswer",
    "FakeEngine",
    "FakeRequest",
    "Gate",
    "NotCancellationSafe",
    "SafetyFailure",
    "SafetyReport",
    "SafetyRow",
    "assert_cancellation_safe",
]
