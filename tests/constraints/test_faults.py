"""A matcher that fails, at any call, fails its own request: no answer goes on without it (I9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import BaseEngine, BatchedEngine, DraftModel, GenerationError, GenerationResult
from mlx_engine.constraints import JSONSchema, Regex
from mlx_engine.models.grammar_compiler import CompiledGrammar
from tests.constraints.schemas import SHAPES
from tests.constraints.test_decoding import PROMPT

pytestmark = pytest.mark.anyio

ASKED: dict[str, Any] = {"constraint": JSONSchema(SHAPES), "max_tokens": 9}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 9}
MATES: list[dict[str, Any]] = [
    {"max_tokens": 12, "ignore_eos": True},
    {"constraint": Regex("[a-e]{12}"), "max_tokens": 12},
]


class Broken:
    """A matcher that fails from a chosen call on, in a chosen way.

    Attributes:
        calls: of any of its methods, so far, of all of them together.
    """

    calls = 0
    at: int | None = None
    way = ""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def __getattr__(self, name: str) -> Any:
        if name == "deep_copy":
            return lambda: Broken(self._matcher.deep_copy())
        method = getattr(self._matcher, name)

        def call(*args: Any) -> Any:
            Broken.calls += 1
            if Broken.at is None or Broken.calls < Broken.at:
                return method(*args)
            if Broken.way == "raises":
                raise BaseException(f"{name} has failed")
            if Broken.way == "errs":
                self._matcher.consume_tokens([0, 0, 0])  # which are nowhere allowed
                assert self._matcher.is_error()
                return method(*args)
            return 0 if name == "try_consume_tokens" else method(*args)

        return call


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    """The matchers of constraints that begin with ``{`` are such ones."""
    make = CompiledGrammar.matcher

    def matcher(compiled: CompiledGrammar) -> Any:
        made = make(compiled)
        return Broken(made) if made.compute_ff_tokens() else made

    monkeypatch.setattr(CompiledGrammar, "matcher", matcher)
    Broken.calls, Broken.at = 0, None
    return Broken


@pytest.fixture(params=[None, "draft"])
async def any_engine(
    request: pytest.FixtureRequest, tiny_path: Path, engine_type: type[BaseEngine]
) -> AsyncIterator[BaseEngine]:
    options = {} if request.param is None else {"decode": DraftModel(tiny_path, 2)}
    async with engine_type(tiny_path, prompt_cache_bytes=0, **options) as engine:
        yield engine


@pytest.mark.parametrize("way", ["raises", "errs", "refuses"])
async def test_a_matcher_that_fails_at_any_call_fails_its_request_only(
    any_engine: BaseEngine, broken: type[Broken], way: str
) -> None:
    mates = [await any_engine.generate([n, 5], **mate) for n, mate in enumerate(MATES)]
    wanted = await any_engine.generate(PROMPT, **ASKED)
    broken.calls, broken.way = 0, way
    await any_engine.generate(PROMPT, **ASKED)
    total, failed = broken.calls, any_engine.stats().failed
    assert total > 30
    for at in range(1, total + 1):
        beside = at % 3 == 0 and isinstance(any_engine, BatchedEngine)
        others = [any_engine.generate([n, 5], **m) for n, m in enumerate(MATES)] if beside else []
        broken.calls, broken.at = 0, at
        tries = asyncio.gather(
            any_engine.generate(PROMPT, **ASKED), *others, return_exceptions=True
        )
        error, *got = await tries
        reached, broken.at = broken.calls >= at, None
        assert [each.tokens for each in got] == [m.tokens for m in mates[: len(got)]]  # type: ignore[union-attr]
        if isinstance(error, GenerationResult):
            # Refusing is nothing where it makes no difference; and beside others it is asked less.
            assert error.tokens == wanted.tokens
            assert not reached or way == "refuses"
        else:
            failed += 1
            assert isinstance(error, GenerationError)
            assert str(error).startswith("req-")
    assert any_engine.stats().failed == failed
    assert failed > 20
    assert (await any_engine.generate(PROMPT, **ASKED)).tokens == wanted.tokens


async def test_a_matcher_that_cannot_be_made_fails_its_request_only(
    engine: BaseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matcher(compiled: CompiledGrammar) -> Any:
        raise MemoryError("no room")

    wanted = await engine.generate(PROMPT, **MATES[0])
    with monkeypatch.context() as patch:
        patch.setattr(CompiledGrammar, "matcher", matcher)
        tries = asyncio.gather(
            engine.generate(PROMPT, **ASKED),
            engine.generate(PROMPT, **MATES[0]),
            return_exceptions=True,
        )
        error, got = await tries
    assert isinstance(error, GenerationError)
    assert "no room" in str(error)
    assert isinstance(got, GenerationResult)
    assert got.tokens == wanted.tokens
