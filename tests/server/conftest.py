"""A server around a fake engine that answers by the ``ANSWERS`` of the module that asks it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from mlx_engine.server import create_app
from mlx_engine.testing import FakeEngine


@pytest.fixture(scope="module")
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[FakeEngine]:
    answers = request.module.ANSWERS
    async with FakeEngine(answers, max_batch_size=4, context_length=200) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine: FakeEngine) -> Any:
    return create_app(engine)


@pytest.fixture
async def http(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as http:
        yield http


@pytest.fixture
def client(http: httpx2.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="any", http_client=http, max_retries=0
    )
