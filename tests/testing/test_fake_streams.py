"""The streams of a FakeEngine: the tests of the real ones."""

from __future__ import annotations

import pytest

from tests import test_stream
from tests.testing.rigged_fake import FAKES, borrowed

pytestmark = pytest.mark.anyio

globals().update(FAKES)
globals().update(
    borrowed(
        test_stream,
        "test_a_failing_request_raises_at_the_reader_and_in_result",  # has a processor
    )
)
