"""Bodies that nobody sends on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine
from tests.server.asgi import CHAT, ask

# Each API's path, and fields that make a request of any others.
APIS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "stream", "seed"),
        *("stream_options", "n", "stop", "logprobs", "top_logprobs", "logit_bias", "max_tokens"),
        *("max_completion_tokens", "temperature", "top_p", "response_format", "reasoning_effort"),
        *("chat_template_kwargs", "thinking", "max_reasoning_tokens", "continue_final_message"),
        *("stop_token_ids", "ignore_eos", "user", "metadata", "prompt", "echo", "suffix"),
    ]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.dictionaries(NAMES, VALUES, max_size=5), valid=st.booleans())
def test_no_body_is_a_failure_of_the_server(
    loop: asyncio.AbstractEventLoop, app: Any, body: dict[str, Any], valid: bool
) -> None:
    for path, needed in APIS.items():
        sent = json.dumps({**body, "max_tokens": 3, **needed} if valid else body).encode()
        reply = loop.run_until_complete(ask(app, sent, path))
        assert reply.status in (200, 400, 404), reply.data
        if reply.status != 200:
            assert reply.json["error"]["message"]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture(scope="module")
def app(loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    engine = FakeEngine("Hi.", max_batch_size=4, context_length=100)
    loop.run_until_complete(engine.start())
    yield create_app(engine)
    loop.run_until_complete(engine.stop())
