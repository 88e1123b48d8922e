"""Engines in one process share what there is: the sum is bounded, and what does not fit is told."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    DraftModel,
    EngineManager,
    GenerationError,
    InvalidRequest,
    MemoryUse,
    NotEnoughMemory,
    ProcessEngine,
    RayEngine,
    SimpleEngine,
)
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.core.work import ThreadJob
from mlx_engine.models import device
from mlx_engine.testing import FakeEngine
from tests.conftest import all_ready, make_tiny, settled
from tests.memory.machines import machine_of
from tests.waiting import until

pytestmark = pytest.mark.anyio

MIB = 2**20


def weights_of(folder: Path) -> int:
    return stored_bytes(folder)


async def test_weights_drafts_and_requests_are_in_the_ledger_and_leave_it(
    tiny_path: Path, engine_type: type[SimpleEngine]
) -> None:
    with machine_of(64 * MIB) as book:
        engine = engine_type(tiny_path, decode=DraftModel(tiny_path, 2))
        async with engine:
            use = engine.stats().memory.use
            assert use.weights == use.drafts
            assert 0.9 * weights_of(tiny_path) < use.weights <= weights_of(tiny_path)
            assert (use.live, use.stored) == (0, 0)
            await engine.generate("hello there, how are you?", max_tokens=20)
            await settled()
            stats = engine.stats()
            cache = stats.prompt_cache.nbytes
            assert stats.memory.use.live == 0
            assert stats.memory.use.stored >= cache > 0, "the draft's prompts as well"
            assert stats.memory.total == 64 * MIB
            assert [owner.name for owner in stats.memory.owners] == [str(tiny_path)]
        assert book.use == MemoryUse()
        after = engine.stats().memory
        assert (after.use, after.owners) == (MemoryUse(), ())
        assert after.peak >= use.total


async def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_path: Path, engine_type: type[SimpleEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(tiny_path)
    loads: list[str] = []
    with machine_of(weights * 3 // 2) as book:
        async with engine_type(tiny_path) as first:
            monkeypatch.setattr(
                "mlx_engine.models.loading.mlx_lm.load",
                lambda path, **_: loads.append(path),
            )
            second = engine_type(tiny_path)
            with pytest.raises(NotEnoughMemory) as caught:
                await second.start()
            assert caught.value.needed == weights
            available = caught.value.available
            assert available == book.total - first.stats().memory.use.total
            assert str(weights) in str(caught.value)
            assert str(available) in str(caught.value)
            assert loads == []
            assert second.state == "created"
            assert second.stats().memory.refused == 1
            assert len(book.accounts) == 1
            monkeypatch.undo()
            assert (await first.generate("hi", max_tokens=2)).tokens
        async with second:  # there is room now
            assert (await second.generate("hi", max_tokens=2)).tokens


async def test_stored_prompts_of_another_engine_give_way_to_a_model(tiny_path: Path) -> None:
    weights = weights_of(tiny_path)
    with machine_of(2 * weights + 50_000) as book:
        first, second = SimpleEngine(tiny_path, prompt_cache_bytes=10**9), SimpleEngine(tiny_path)
        async with first:
            for n in range(3):
                await first.generate([n + 1] * 300, max_tokens=1)
            stored = book.use.stored
            assert stored > 50_000
            async with second:
                assert book.use.stored < stored
                assert first.stats().prompt_cache.nbytes == first.stats().memory.use.stored


async def test_the_prompts_of_two_engines_share_what_is_left(tiny_path: Path) -> None:
    weights = weights_of(tiny_path)
    total = 2 * weights + 600_000
    with machine_of(total) as book:
        options: dict[str, Any] = {"prompt_cache_bytes": 10**9}
        async with (
            SimpleEngine(tiny_path, **options) as one,
            SimpleEngine(tiny_path, **options) as other,
        ):
            for n in range(20):
                await asyncio.gather(
                    one.generate([n + 1] * 200, max_tokens=1),
                    other.generate([n + 101] * 200, max_tokens=1),
                )
                use = book.use
                assert use.models + use.caches / 0.9 <= total
            assert min(e.stats().prompt_cache.entries for e in (one, other)) >= 1
            evicted = sum(e.stats().prompt_cache.evicted for e in (one, other))
            assert evicted > 0


async def test_a_prompt_that_could_never_fit_is_refused_with_both_numbers(
    tiny_path: Path,
) -> None:
    with machine_of(weights_of(tiny_path) + 200_000):
        async with SimpleEngine(tiny_path) as engine:
            with pytest.raises(InvalidRequest, match=r"^prompt: 3000 tokens need \d+ .* are \d+ "):
                await engine.generate([5] * 3000, max_tokens=1)
            assert (await engine.generate([5] * 30, max_tokens=3)).tokens


async def test_an_answer_ends_where_memory_does_and_says_so(tiny_path: Path) -> None:
    with machine_of(None):
        async with SimpleEngine(tiny_path, prompt_cache_bytes=0) as free:
            whole = await free.generate([5] * 30, max_tokens=3000, ignore_eos=True)
            size = free._holder.runner().footprint.nbytes(256)
    with machine_of(int(weights_of(tiny_path) + 3.5 * size / 0.9)):
        async with SimpleEngine(tiny_path) as engine:
            result = await engine.generate([5] * 30, max_tokens=3000, ignore_eos=True)
            assert result.finish_reason == "length"
            assert 500 < len(result.tokens) < 1024
            assert result.tokens == whole.tokens[: len(result.tokens)]
            assert any("no memory for a longer KV cache" in note for note in result.notes)
            assert engine.stats().memory.refused > 0
            again = await engine.generate([5] * 30, max_tokens=10, ignore_eos=True)
            assert again.tokens == whole.tokens[:10]
            assert not again.notes


@pytest.mark.parametrize("length", [100, 1])
async def test_a_prompt_for_which_others_have_the_memory_fails_with_both_numbers(
    tiny_path: Path, length: int
) -> None:
    """Of one token nothing is prefilled before it decodes."""
    with machine_of(8 * MIB) as book:
        async with SimpleEngine(tiny_path) as engine:
            other = book.account("other")
            assert other.claim("live", other.room("live") or 0)
            with pytest.raises(GenerationError, match=r"need \d+ bytes .*, and 0 are left"):
                await engine.generate([5] * length, max_tokens=1)
            other.close()
            assert (await engine.generate([5] * length, max_tokens=1)).tokens
            assert engine.stats().memory.use.live == 0


async def test_requests_for_which_a_model_that_came_later_leaves_no_room_are_told(
    tiny_path: Path,
) -> None:
    """One that is paused, one that waits, and one that comes; a shorter one is served."""
    with machine_of(8 * MIB) as book:
        async with BatchedEngine(tiny_path, prompt_cache_bytes=0) as engine:
            size = engine._holder.runner().footprint.nbytes(1024)
            other = book.account("other")

            async def ask(length: int) -> None:
                with pytest.raises(GenerationError, match=rf" {length} prompt tokens and \d+ more"):
                    await engine.generate([5] * length, max_tokens=400, ignore_eos=True)

            begun = asyncio.create_task(ask(700))
            await until(lambda: engine.stats().completion_tokens > 0, "it does not begin")
            assert other.claim("live", other.room("live") or 0)
            await until(lambda: engine.stats().preemptions == 1, "it does not make room")
            waiting = asyncio.create_task(ask(720))
            await until(lambda: all_ready(engine, 1), "it does not wait")
            weights = engine.stats().memory.use.weights
            with book.locked():
                other.set("live", 0)
                assert other.claim("weights", int(8 * MIB - weights - size / 2 / 0.9))
            await asyncio.gather(begun, waiting)
            assert (await engine.generate([5] * 30, max_tokens=3)).tokens


async def test_memory_bounds_one_engine(tiny_path: Path, engine_type: type[SimpleEngine]) -> None:
    weights = weights_of(tiny_path)
    with machine_of(10**9):
        async with engine_type(tiny_path, memory=weights + 2 * MIB) as engine:
            stats = engine.stats()
            assert stats.memory.limit == weights + 2 * MIB
            assert stats.prompt_cache.limit <= MIB
        async with engine_type(tiny_path, memory=0.5) as engine:
            assert engine.stats().memory.limit == 10**9 // 2
        small = engine_type(tiny_path, memory=MIB)
        if weights > MIB:
            with pytest.raises(NotEnoughMemory, match=r"may have 1048576 \(memory\)"):
                await small.start()


MAKERS: list[Callable[..., BaseEngine]] = [
    SimpleEngine,
    BatchedEngine,
    ProcessEngine,
    RayEngine,
    EngineManager,
    EngineManager.on_ray,
    lambda model, **options: FakeEngine(model=model, **options),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "memory",
    [
        *(-1, 0, True, 1, 2**20 - 1, 1.5, 0.0, -0.5, float("nan"), None, [5], 10**30),
        *("much", "9" * 400 + "GB", "9" * 5000 + "GB", "0GB", "50%"),
    ],
)
def test_what_is_no_memory_is_refused_by_name(make: Callable[..., BaseEngine], memory: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^memory: must be .*, not ") as caught:
        make("demo", memory=memory)
    assert caught.value.option == "memory"


@pytest.mark.parametrize("make", [SimpleEngine, BatchedEngine])
async def test_more_than_the_machine_has_is_refused_at_start(
    make: type[SimpleEngine], tiny_path: Path
) -> None:
    with machine_of(10**9) as book:
        engine = make(tiny_path, memory=10**9 + 1)
        with pytest.raises(InvalidRequest, match=r"^memory: must be 1000000000 bytes at most"):
            await engine.start()
        assert book.accounts == ()


def test_shares_that_contradict_are_named_both() -> None:
    memory: dict[str, Any] = {"memory": 2 * MIB}
    with pytest.raises(InvalidRequest, match=r"^prompt_cache_bytes: .* share of memory, which is "):
        SimpleEngine("demo", prompt_cache_bytes=3 * MIB, **memory)
    with pytest.raises(InvalidRequest, match=r"^kv_cache_memory_bytes: .* share of memory, which "):
        BatchedEngine("demo", kv_cache_memory_bytes=3 * MIB, **memory)
    with pytest.raises(InvalidRequest, match=r"^prompt_cache_bytes: .* of kv_cache_memory_bytes"):
        BatchedEngine("demo", kv_cache_memory_bytes=MIB, prompt_cache_bytes=2 * MIB)
    BatchedEngine("demo", kv_cache_memory_bytes=MIB, prompt_cache_bytes=MIB, **memory)


async def test_a_share_that_the_weights_leave_no_room_for_is_named_with_the_whole(
    tiny_path: Path,
) -> None:
    weights = weights_of(tiny_path)
    with machine_of(10**9) as book:
        memory = max(MIB, weights + 100_000)
        engine = BatchedEngine(tiny_path, memory=memory, kv_cache_memory_bytes=memory - 1000)
        with pytest.raises(InvalidRequest, match=r"^kv_cache_memory_bytes: .* raise memory$"):
            await engine.start()
        assert book.accounts == ()


async def test_a_load_that_fails_leaves_nothing_in_the_ledger(
    tiny_path: Path, tmp_path: Path, engine_type: type[SimpleEngine]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_path, broken)
    for file in broken.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with machine_of(10**9) as book:
        for _ in range(2):
            with pytest.raises(Exception, match=r"broken|damaged"):
                await engine_type(broken).start()
            assert book.accounts == ()


async def test_an_engine_that_is_dropped_gives_its_memory_back(tiny_path: Path) -> None:
    with machine_of(10**9) as book:
        engine = SimpleEngine(tiny_path)
        await engine.start()
        with pytest.warns(ResourceWarning):
            del engine
        await mlx_thread.run(ThreadJob(lambda: None))
        assert book.use == MemoryUse()


async def test_the_wired_limit_is_set_once_and_lowered_with_the_last_engine(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MLX's function played: only a Mac has such a limit."""
    limits: list[int] = []

    def set_wired_limit(nbytes: int) -> int:
        limits.append(nbytes)
        return limits[-2] if len(limits) > 1 else 7

    info = {**mx.device_info(), "max_recommended_working_set_size": 10**9}
    monkeypatch.setattr(device.mx, "device_info", lambda: info)
    monkeypatch.setattr(device.mx, "set_wired_limit", set_wired_limit)
    with machine_of(10**9):
        async with SimpleEngine(tiny_path):
            async with SimpleEngine(tiny_path):
                assert limits == [10**9]
            assert limits == [10**9]
        assert limits == [10**9, 7]
        part = SimpleEngine(tiny_path)
        part.limit_memory(10**8)
        async with part:
            assert limits[2:] == [10**8]


async def test_a_device_that_says_what_it_may_have_is_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = {**mx.device_info(), "max_recommended_working_set_size": 123_456}
    monkeypatch.setattr(device.mx, "device_info", lambda: info)
    with machine_of(5) as book:
        assert book.account("one").room("weights") == 5
        await mlx_thread.run(ThreadJob(device.measure_device))
        assert book.total == 123_456


async def test_an_engine_on_this_machine_is_bounded_and_refuses_nothing(
    tiny_path: Path, engine_type: type[SimpleEngine]
) -> None:
    async with engine_type(tiny_path) as engine:
        memory = engine.stats().memory
        assert memory.total is not None
        assert memory.limit is None
        assert engine.stats().prompt_cache.limit <= 2**30


def test_the_tiny_model_is_what_these_tests_think(tmp_path: Path) -> None:
    assert weights_of(make_tiny(tmp_path, "3")) > 100_000
