"""Cancelling requests of a FakeEngine in every phase and way: the tests of the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BaseEngine
from tests.engine import test_cancellation
from tests.testing.rigged_fake import FAKES, RiggedBatch, borrowed

pytestmark = pytest.mark.anyio

globals().update(FAKES)
globals().update(
    borrowed(
        test_cancellation,
        "test_a_cancelled_start_leaves_nothing_and_can_be_tried_again",  # of a real model
        "test_a_cancelled_start_makes_no_more_trials_of_the_model",
    )
)
globals().update(engine=test_cancellation.engine)  # a fixture


@pytest.fixture
async def narrow(tiny_path: Path, engine_type: Any) -> AsyncIterator[BaseEngine]:
    """An engine in which a second request has to wait."""
    width = {"max_batch_size": 1} if engine_type is RiggedBatch else {}
    async with engine_type(tiny_path, prefill_step_size=test_cancellation.STEP, **width) as engine:
        yield engine
