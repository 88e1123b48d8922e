"""Logits that are not numbers fail their own request, which says so; nobody gets token 0."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    MTP,
    BaseEngine,
    BatchedEngine,
    DraftModel,
    GenerationError,
    SimpleEngine,
)
from tests.conftest import make_tiny
from tests.generation.rigged import made
from tests.models.mtp_checkpoints import MIMO

pytestmark = pytest.mark.anyio

PROMPT = [i * 37 % 250 + 1 for i in range(12)]
OTHERS = [[n, n + 1, n + 2] for n in range(1, 5)]
TOKENS: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    "seeded": {"temperature": 1.0, "min_p": 0.01, "seed": 3},
    "with logprobs": {"logprobs": 3},
    "penalised": {"repetition_penalty": 1.1, "logit_bias": {3: 1.0}},
}
ENGINES: dict[str, Callable[[Path], BaseEngine]] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "draft": lambda model: SimpleEngine(model, decode=DraftModel(model.parent / "draft", 3)),
    "batched, draft": lambda model: BatchedEngine(
        model, decode=DraftModel(model.parent / "draft", 3)
    ),
    "mtp": lambda model: SimpleEngine(model.parent / "mtp" / "converted", decode=MTP(3)),
}


@pytest.fixture(scope="module")
async def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models, each with its own weights."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "model", "0")
    make_tiny(folder / "draft", "0")
    await made(MIMO, folder / "mtp", 3)
    return folder / "model"


async def spoil(engine: BaseEngine, token: int, value: float) -> None:
    """Let the model see such numbers wherever this token is."""

    def change() -> None:
        embedding = engine._holder.model().model.model.embed_tokens
        embedding.weight[token] = value
        mx.eval(embedding.weight)

    await engine.run_blocking(change)


async def until_it_fails(engine: BaseEngine, **options: Any) -> tuple[list[int], GenerationError]:
    tokens: list[int] = []
    with pytest.raises(GenerationError) as error:
        async with engine.stream_generate(PROMPT, **TOKENS, **options) as stream:
            async for chunk in stream:
                tokens.extend(chunk.tokens)
    return tokens, error.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ENGINES)
async def test_a_model_whose_logits_are_no_numbers_fails_the_request(
    models: Path, kind: str, value: float
) -> None:
    async with ENGINES[kind](models) as engine:
        await spoil(engine, PROMPT[-1], value)
        for options in OPTIONS.values():
            tokens, error = await until_it_fails(engine, **options)
            assert tokens == []
            assert "NaN or infinite" in str(error)
            assert str(error).startswith("req-")
        assert engine.stats().failed == len(OPTIONS)
        healthy = await engine.generate(OTHERS[0], max_tokens=5, logit_bias={PROMPT[-1]: -1e9})
        assert len(healthy.tokens) >= 1


@pytest.mark.parametrize("kind", ENGINES)
async def test_tokens_before_the_fault_are_those_of_a_healthy_model(
    models: Path, kind: str
) -> None:
    async with ENGINES[kind](models) as engine:
        healthy = (await engine.generate(PROMPT, **TOKENS)).tokens
        known = {*PROMPT}
        at = next(i for i, t in enumerate(healthy) if i >= 5 and t not in {*known, *healthy[:i]})
        await spoil(engine, healthy[at], float("nan"))
        for options in ({}, {"logprobs": 2}):
            tokens, error = await until_it_fails(engine, **options)
            assert tuple(tokens) == healthy[: len(tokens)]
            # A NaN among several tokens that go in at once spoils all of them.
            most = 3 if "draft" in kind or kind == "mtp" else 0
            assert at + 1 - most <= len(tokens) <= at + 1, "up to the token that it cannot read"
            assert "NaN or infinite" in str(error)


async def test_batch_mates_of_a_request_without_numbers_get_their_tokens(models: Path) -> None:
    options = [*OPTIONS.values()][:1] + [OPTIONS["seeded"]] * 3

    async def answers() -> list[tuple[int, ...]]:
        asked = zip(OTHERS, options, strict=True)
        results = await asyncio.gather(
            *(engine.generate(p, **TOKENS, **o, logit_bias={PROMPT[-1]: -1e9}) for p, o in asked)
        )
        return [result.tokens for result in results]

    async with BatchedEngine(models, prompt_cache_bytes=0) as engine:
        expected = await answers()
        await spoil(engine, PROMPT[-1], float("nan"))
        found, *failed = await asyncio.gather(
            answers(), *(until_it_fails(engine, **o) for o in OPTIONS.values())
        )
        assert found == expected
        assert len(failed) == len(OPTIONS)
        assert engine.stats().failed == len(OPTIONS)


async def test_a_draft_without_numbers_changes_no_token(models: Path) -> None:
    async with SimpleEngine(models) as engine:
        expected = await engine.generate(PROMPT, **TOKENS)
    async with ENGINES["draft"](models) as engine:

        def spoil_draft() -> None:
            drafter: Any = engine._holder.runner().strategies.speculation.make_drafter()  # type: ignore[union-attr]
            embedding = drafter._draft.model.model.embed_tokens
            embedding.weight[:] = float("nan")
            mx.eval(embedding.weight)

        await engine.run_blocking(spoil_draft)
        for options in ({}, {"temperature": 1.0, "seed": 4}):
            result = await engine.generate(PROMPT, **TOKENS, **options)
            if not options:
                assert result.tokens == expected.tokens
            assert len(result.tokens) == 30


def leaves_nothing(value: float) -> Callable[[mx.array, mx.array], mx.array]:
    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, value) if tokens.size >= len(PROMPT) + 4 else logits

    return processor


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
@pytest.mark.parametrize("kind", ENGINES)
async def test_processors_that_leave_nothing_are_named(
    models: Path, kind: str, value: float
) -> None:
    async with ENGINES[kind](models) as engine:
        healthy = await engine.generate(PROMPT, **TOKENS)
        for options in (OPTIONS["greedy"], OPTIONS["seeded"]):
            tokens, error = await until_it_fails(
                engine, logits_processors=[leaves_nothing(value)], **options
            )
            assert len(tokens) <= 4
            if options == OPTIONS["greedy"]:
                assert healthy.tokens[: len(tokens)] == tuple(tokens)
            if "draft" not in kind:  # where a cycle that fails gives none of its tokens
                assert len(tokens) >= 3
            assert "its logits processors leave nothing to sample" in str(error)
        assert (await engine.generate(PROMPT, **TOKENS)).tokens == healthy.tokens


@pytest.mark.parametrize("kind", ["simple", "batched", "draft"])
async def test_a_model_without_numbers_is_not_blamed_on_a_processor(
    models: Path, kind: str
) -> None:
    async with ENGINES[kind](models) as engine:
        await spoil(engine, PROMPT[-1], float("nan"))
        _, error = await until_it_fails(engine, logits_processors=[lambda tokens, logits: logits])
        assert "the model's logits" in str(error)


async def test_excluding_all_tokens_but_one_is_no_fault(models: Path) -> None:
    def only(tokens: mx.array, logits: mx.array) -> mx.array:
        chosen = mx.arange(logits.shape[-1]) == 65 + tokens.size % 3
        return mx.where(chosen, logits, -mx.inf)

    for kind in ("simple", "batched", "draft"):
        async with ENGINES[kind](models) as engine:
            for options in OPTIONS.values():
                result = await engine.generate(
                    PROMPT, **TOKENS, **options, logits_processors=[only]
                )
                assert set(result.tokens) == {65, 66, 67}
