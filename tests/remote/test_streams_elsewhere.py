"""The streams of an engine in a process of its own: the tests of those in this one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_engine import ProcessEngine
from tests import test_stream
from tests.testing.rigged_fake import borrowed

pytestmark = pytest.mark.anyio

globals().update(
    {
        name: test
        for name, test in borrowed(
            test_stream,
            # These count from a new engine.
            "test_break_without_a_context_frees_the_engine_and_warns",
            "test_wake_ups_are_coalesced",
            "test_a_failing_request_raises_at_the_reader_and_in_result",  # has a function
        ).items()
        if "gate" not in (names := inspect.signature(test).parameters) and "engine" in names
    }
)


@pytest.fixture(scope="module")
def engine(tiny_path: Path) -> Iterator[ProcessEngine]:
    """One for all tests; started in a loop that is closed by now."""
    engine = ProcessEngine(tiny_path, engine="batched")
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())
