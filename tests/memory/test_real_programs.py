"""Random programs of real engines on a machine that is played: the sum stays within it.

``MLX_ENGINE_REAL_MEMORY_PROGRAMS`` is how many of them there are.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_engine import (
    BatchedEngine,
    DraftModel,
    EngineNotRunning,
    GenerationError,
    GenerationResult,
    InvalidRequest,
    MemoryUse,
    NotEnoughMemory,
    SimpleEngine,
)
from mlx_engine.core.ledger import Account, Ledger
from mlx_engine.core.pressure import Level, PressureWatch
from mlx_engine.core.weight_size import stored_bytes
from tests.conftest import make_tiny, settled
from tests.guard import GUARD
from tests.memory.machines import machine_of
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(3600)]

PROGRAMS = int(os.environ.get("MLX_ENGINE_REAL_MEMORY_PROGRAMS", "8"))
CONTEXT = 768
LENGTHS = (1, 60, 250, 500)
SEEDS = 3
FAULT = "out of memory, by a test"


class Answers(dict[tuple[int, int], tuple[int, ...]]):
    """By seed and length of the prompt."""

    def __repr__(self) -> str:  # or each failure would show them all
        return "answers"


which = st.integers(0, 2)
asked = st.tuples(
    st.just("ask"),
    which,
    st.integers(0, SEEDS - 1),
    st.sampled_from(LENGTHS),
    st.sampled_from([0, 1, 20, 200, None, None]),
    st.integers(0, 1),
    st.none() | st.none() | st.integers(0, 200),
)
rest = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(["batched", "simple", "draft"])),
    st.tuples(st.just("fault"), st.integers(0, 40)),
    st.tuples(st.just("close"), which, st.sampled_from([0, 0.05, None])),
    st.tuples(st.just("pressure"), st.sampled_from(["normal", "warning", "critical"])),
    st.tuples(st.just("turns"), st.sampled_from([1, 20, 200])),
)
step = st.integers(0, 9).flatmap(lambda n: asked if n < 6 else rest)


def prompt_of(seed: int, length: int) -> list[int]:
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(1, 250) for _ in range(length)]


class Told:
    """A source of pressure that says what the program has told it."""

    said: Level = "normal"

    def level(self) -> Level:
        return self.said


class World:
    """One program."""

    def __init__(self, folder: Path, answers: Answers) -> None:
        self._folder, self._answers = folder, answers
        self._engines: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._source = Told()
        self._watch = PressureWatch(self._source)
        self._calls: int | None = None  # of the model, until one fails
        self._faulty = False

    async def run(self, program: list[tuple[Any, ...]]) -> None:
        """All of it; then everybody ends, by himself."""
        GUARD.hook = self._called
        try:
            await self.open("batched")
            for name, *args in program:
                await getattr(self, name)(*args)
            await self.pressure("normal")
            for _ in range(3):
                self._watch.look()
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*self._tasks)
            await settled()
            for engine in self._engines:
                stats = engine.stats()
                assert stats.running == stats.waiting == stats.kv_bytes == 0
                assert stats.memory.use.live == 0
        finally:
            GUARD.hook = None
            for engine in self._engines:
                await engine.stop()

    async def open(self, kind: str) -> None:
        options: dict[str, Any] = {"context_length": CONTEXT, "prefill_step_size": 64}
        if kind == "draft":
            options["decode"] = DraftModel(self._folder, 2)
        make = SimpleEngine if kind == "simple" else BatchedEngine
        engine = make(self._folder, **options)
        if len(self._engines) < 3:
            try:
                await engine.start()
                self._engines.append(engine)
            except NotEnoughMemory:
                pass
            except Exception:
                if not self._faulty:  # which may have been its trial
                    raise

    async def ask(self, which: int, *args: Any) -> None:
        if self._engines:
            engine = self._engines[which % len(self._engines)]
            self._tasks.append(asyncio.create_task(self._ask(engine, *args)))

    async def _ask(
        self, engine: Any, seed: int, length: int, tokens: int | None, priority: int, cancel: Any
    ) -> None:
        more = {"priority": priority} if isinstance(engine, BatchedEngine) else {}
        task = asyncio.ensure_future(
            engine.generate(prompt_of(seed, length), max_tokens=tokens, ignore_eos=True, **more)
        )
        for _ in range(cancel or 0):
            await asyncio.sleep(0)
        if cancel is not None:
            task.cancel()
        try:
            result: GenerationResult = await task
        except asyncio.CancelledError:
            assert cancel is not None
        except (InvalidRequest, EngineNotRunning):
            pass
        except GenerationError as error:
            if not ("bytes of KV cache" in str(error) or FAULT in str(error)):
                raise
        else:
            expected = self._answers[seed, length]
            wanted = CONTEXT - length if tokens is None else tokens
            assert result.tokens == expected[: len(result.tokens)]
            if len(result.tokens) < wanted:
                assert tokens is None or "no memory" in " ".join(result.notes)

    async def fault(self, after: int) -> None:
        self._calls, self._faulty = after, True

    async def close(self, which: int, timeout: float | None) -> None:
        if self._engines:
            engine = self._engines.pop(which % len(self._engines))
            self._tasks.append(asyncio.create_task(engine.shutdown(timeout)))

    async def pressure(self, level: Level) -> None:
        self._source.said = level
        self._watch.look()

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    def _called(self, name: str) -> None:
        if name == "model" and self._calls is not None:
            self._calls -= 1
            if self._calls < 0:
                self._calls = None
                raise RuntimeError(FAULT)


@contextmanager
def audited(book: Ledger, total: int) -> Iterator[list[float]]:
    """Whatever anybody has is looked at as it changes; bytes beyond the machine."""
    beyond: list[float] = []
    have = Account.set

    def checked(account: Account, kind: str, nbytes: int) -> None:
        have(account, kind, nbytes)
        use = book.use
        beyond.append(use.models + use.caches / 0.9 - total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Account, "set", checked)
        patch.setattr("mlx_engine.engine.engine_memory.watch_pressure", lambda: None)
        yield beyond


@pytest.fixture(scope="module")
async def answers(tiny_path: Path) -> Answers:
    found = Answers()
    async with SimpleEngine(tiny_path, context_length=CONTEXT, prompt_cache_bytes=0) as engine:
        for seed in range(SEEDS):
            for length in LENGTHS:
                result = await engine.generate(
                    prompt_of(seed, length), max_tokens=None, ignore_eos=True
                )
                found[seed, length] = result.tokens
    return found


async def test_a_prompt_that_is_stored_whole_grows_by_no_more_than_is_claimed(
    tiny_path: Path,
) -> None:
    token = 2 * 2 * 32 * 4  # layers, keys and values, dimension, bytes
    total = int(stored_bytes(tiny_path) + 400 * token / 0.9)
    with machine_of(total) as book, audited(book, total) as beyond:
        async with SimpleEngine(tiny_path, prompt_cache_bytes=400 * token) as engine:
            await engine.generate([1] * 250, max_tokens=0)
            result = await engine.generate([1] * 250, max_tokens=40, ignore_eos=True)
    assert result.usage.cached_tokens == 249
    assert result.tokens
    assert max(beyond) <= 0


async def test_a_window_holds_no_more_than_is_claimed_while_a_prompt_is_prefilled(
    tmp_path: Path,
) -> None:
    kind = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 64}
    kind |= {"sliding_window_pattern": 6, "query_pre_attn_scalar": 16}
    folder = make_tiny(tmp_path / "model", "--other", json.dumps(kind))
    async with SimpleEngine(folder) as engine:
        need = engine._holder.runner().footprint.claim(1000)
    total = int(stored_bytes(folder) + need / 0.9) + 1
    with machine_of(total) as book, audited(book, total) as beyond:
        async with SimpleEngine(folder, prefill_step_size=512, prompt_cache_bytes=0) as engine:
            result = await engine.generate(prompt_of(1, 900), max_tokens=100, ignore_eos=True)
    assert len(result.tokens) == 100
    assert max(beyond) <= 0


@settings(
    max_examples=PROGRAMS,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    contexts=st.sampled_from([0.5, 1.5, 3.0]),
    models=st.sampled_from([1, 2, 3]),
    program=st.lists(step, min_size=4, max_size=20),
)
async def test_any_program_stays_within_the_machine_with_the_right_tokens(
    tiny_path: Path,
    answers: Answers,
    contexts: float,
    models: int,
    program: list[tuple[Any, ...]],
) -> None:
    footprint = 2 * 2 * 32 * 4 * CONTEXT  # layers, keys and values, dimension, bytes
    total = int(models * stored_bytes(tiny_path) + contexts * footprint / 0.9)
    with machine_of(total) as book, audited(book, total) as beyond:
        await World(tiny_path, answers).run(program)
        assert max(beyond) <= 0
        await settled()
        assert book.use == MemoryUse()
        assert book.accounts == ()
