"""Faults stay small: who is at fault fails, the others get the very same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    BatchedEngine,
    EngineDead,
    EngineState,
    GenerationError,
    GenerationResult,
    InvalidRequest,
)
from tests.conftest import all_ready
from tests.guard import GUARD, Gate
from tests.waiting import until

pytestmark = pytest.mark.anyio

MakeGate = Callable[[str, int], Gate]
PROMPTS = [[n, n + 1, n + 2] for n in range(1, 6)]


@pytest.fixture
async def engine(tiny_path: Path) -> AsyncIterator[BatchedEngine]:
    async with BatchedEngine(tiny_path, prompt_cache_bytes=0, max_batch_size=8) as engine:
        yield engine


async def answers(engine: BatchedEngine) -> list[tuple[int, ...]]:
    results = await asyncio.gather(
        *(engine.generate(p, max_tokens=20, ignore_eos=True) for p in PROMPTS)
    )
    return [result.tokens for result in results]


def raises_at(n: int, error: BaseException) -> Callable[[mx.array, mx.array], mx.array]:
    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size >= 3 + n:
            raise error
        return logits

    return processor


def singular(tokens: mx.array, logits: mx.array) -> mx.array:
    """Fails only when it is evaluated."""
    return logits + mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu).sum()  # type: ignore[arg-type]


PROCESSORS: dict[str, Callable[[mx.array, mx.array], Any]] = {
    "at the first token": raises_at(0, ZeroDivisionError("at the first token")),
    "later": raises_at(7, KeyError("later")),
    "a cancellation that is nobody's": raises_at(3, asyncio.CancelledError()),
    "an exit": raises_at(3, SystemExit(3)),
    "memory": raises_at(3, MemoryError()),
    "wrong shape": lambda tokens, logits: logits[:, :-1],
    "no array": lambda tokens, logits: None,
    "when evaluated": singular,
}


@pytest.mark.parametrize("kind", PROCESSORS)
async def test_a_logits_processor_that_fails_costs_its_own_request_only(
    engine: BatchedEngine, kind: str
) -> None:
    expected = await answers(engine)
    bad = engine.generate(
        [7, 8, 9], max_tokens=20, ignore_eos=True, logits_processors=[PROCESSORS[kind]]
    )
    others, error = await asyncio.gather(answers(engine), bad, return_exceptions=True)
    assert others == expected
    assert isinstance(error, GenerationError)
    assert str(error).startswith("req-")
    assert engine.stats().failed == 1
    assert await answers(engine) == expected


async def test_a_fault_of_a_stream_comes_after_the_tokens_before_it(engine: BatchedEngine) -> None:
    tokens: list[int] = []
    with pytest.raises(GenerationError, match="later"):
        async with engine.stream_generate(
            [7, 8, 9], max_tokens=20, ignore_eos=True, logits_processors=[PROCESSORS["later"]]
        ) as stream:
            async for chunk in stream:
                tokens.extend(chunk.tokens)
    assert 6 <= len(tokens) <= 7


async def test_options_that_cannot_be_sampled_cost_their_own_request_only(
    engine: BatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_engine.generation import sampler

    expected = await answers(engine)

    def broken(seed: int, position: int) -> list[int]:
        raise ValueError("no luck")

    monkeypatch.setattr(sampler, "_key", broken)
    bad = engine.generate([7], max_tokens=20, temperature=1.0, seed=1)
    others, error = await asyncio.gather(answers(engine), bad, return_exceptions=True)
    assert others == expected
    assert isinstance(error, GenerationError)
    assert "no luck" in str(error)


@pytest.mark.parametrize("method", ["add", "finish"])
async def test_a_tokenizer_that_fails_costs_its_own_request_only(
    engine: BatchedEngine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from mlx_engine.generation.text import TextAssembler

    expected = await answers(engine)
    original = getattr(TextAssembler, method)

    def sometimes(self: TextAssembler, *args: int) -> Any:
        if self._stops is not None:  # only the bad request has stop strings
            raise UnicodeError("half a character")
        return original(self, *args)

    monkeypatch.setattr(TextAssembler, method, sometimes)
    bad = engine.generate([7], max_tokens=5, ignore_eos=True, stop="never to be seen")
    others, error = await asyncio.gather(answers(engine), bad, return_exceptions=True)
    assert others == expected
    assert isinstance(error, GenerationError)


async def test_a_prompt_that_cannot_be_encoded_costs_its_own_request_only(
    engine: BatchedEngine,
) -> None:
    expected = await answers(engine)
    bad = [
        engine.generate([99999], max_tokens=1),
        engine.generate([1] * 20000, max_tokens=1),
        engine.chat([{"role": "user", "content": "x"}], tools=[{}], max_tokens=2, seed=-1 + 1),
    ]
    others, *errors = await asyncio.gather(answers(engine), *bad, return_exceptions=True)
    assert others == expected
    assert isinstance(errors[0], InvalidRequest)
    assert isinstance(errors[1], InvalidRequest)
    assert isinstance(errors[2], InvalidRequest)


def fail_calls(*numbers: int, kind: str = "model") -> Callable[[str], None]:
    calls = 0

    def hook(name: str) -> None:
        nonlocal calls
        if name == kind:
            calls += 1
            if calls in numbers:
                raise RuntimeError("[METAL] Command buffer execution failed")

    return hook


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Any:
    yield
    GUARD.hook = None


async def test_a_step_in_which_mlx_fails_costs_those_in_flight_and_the_engine_goes_on(
    engine: BatchedEngine,
) -> None:
    expected = await answers(engine)
    GUARD.hook = fail_calls(8)  # one for the prefill of all, then decode
    outcomes = await asyncio.gather(
        *(engine.generate(p, max_tokens=20, ignore_eos=True) for p in PROMPTS),
        return_exceptions=True,
    )
    assert all(isinstance(outcome, GenerationError) for outcome in outcomes)
    assert all("Command buffer" in str(outcome) for outcome in outcomes)
    assert all(len(str(outcome)) < 80 for outcome in outcomes), "no traceback in a message"
    assert engine.state is EngineState.RUNNING
    assert await answers(engine) == expected


async def test_those_who_wait_are_served_after_a_failed_step(tiny_path: Path) -> None:
    async with BatchedEngine(tiny_path, max_batch_size=2, prompt_cache_bytes=0) as engine:
        GUARD.hook = fail_calls(4)
        outcomes = await asyncio.gather(
            *(engine.generate(p, max_tokens=20, ignore_eos=True) for p in PROMPTS),
            return_exceptions=True,
        )
    failed = [outcome for outcome in outcomes if isinstance(outcome, GenerationError)]
    assert len(failed) == 2
    assert all(isinstance(o, GenerationResult) for o in outcomes if o not in failed)


async def test_a_prefill_in_which_mlx_fails_costs_its_own_request_only(
    engine: BatchedEngine, gate: MakeGate
) -> None:
    long = engine.generate(list(range(1, 200)) * 10, max_tokens=3, ignore_eos=True)
    stop = gate("model", 4)
    others = asyncio.create_task(answers(engine))
    await stop.reached()
    failing = asyncio.ensure_future(long)
    await until(lambda: all_ready(engine, 1))
    calls = 0

    def hook(name: str) -> None:
        nonlocal calls
        calls += name == "model"
        if name == "model" and calls == 2:  # the first one is a decode step
            raise RuntimeError("no memory for such a chunk")

    GUARD.hook = hook
    stop.go()
    with pytest.raises(GenerationError, match="no memory"):
        await failing
    GUARD.hook = None
    assert await others == await answers(engine)


async def test_when_mlx_fails_for_good_everyone_is_told_and_the_engine_can_be_started_again(
    tiny_path: Path,
) -> None:
    engine = BatchedEngine(tiny_path, max_batch_size=2)
    async with engine:
        expected = await answers(engine)

        def hook(name: str) -> None:
            if name == "model":
                raise RuntimeError("the device is lost")

        GUARD.hook = hook
        outcomes = await asyncio.gather(
            *(engine.generate(p, max_tokens=20, ignore_eos=True) for p in PROMPTS),
            return_exceptions=True,
        )
        assert all(isinstance(o, GenerationError | EngineDead) for o in outcomes)
        assert engine.state is EngineState.FAILED
        assert engine.stats().state == "failed"
        with pytest.raises(EngineDead, match="the device is lost"):
            await engine.generate([1])
        GUARD.hook = None
        await engine.stop()
        await engine.start()
        assert await answers(engine) == expected


async def test_steps_that_fail_again_and_again_make_it_fail(engine: BatchedEngine) -> None:
    def hook(name: str) -> None:
        if name == "async_eval":  # decode only: what is tried in between works
            raise RuntimeError("once more")

    GUARD.hook = hook
    for n in range(3):
        assert engine.state is EngineState.RUNNING, n
        with pytest.raises((GenerationError, EngineDead)):
            await engine.generate([1], max_tokens=3)
    assert engine.state is EngineState.FAILED
    GUARD.hook = None


@pytest.mark.parametrize("method", ["extend", "extract", "filter"])
async def test_a_cache_that_fails_once_does_not_end_the_engine(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from mlx_lm.models.cache import BatchKVCache

    async with BatchedEngine(tiny_path, max_batch_size=8) as engine:
        expected = await answers(engine)
        original, calls = getattr(BatchKVCache, method), 0

        def once(self: object, *args: object) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("out of memory")
            return original(self, *args)

        monkeypatch.setattr(BatchKVCache, method, once)
        outcomes = await asyncio.gather(
            *(
                engine.generate(p, max_tokens=20 - n, ignore_eos=True)
                for n, p in enumerate([*PROMPTS, [1] * 700])
            ),
            return_exceptions=True,
        )
        assert calls
        for outcome, tokens in zip(outcomes, [*expected, ()], strict=True):
            if isinstance(outcome, GenerationResult) and tokens:
                assert outcome.tokens == tokens[: len(outcome.tokens)]
            else:
                assert isinstance(outcome, GenerationError | GenerationResult)
                assert "out of memory" in str(outcome) or not tokens
        assert engine.state is EngineState.RUNNING
        assert await answers(engine) == expected
