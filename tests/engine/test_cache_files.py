"""A prompt cache is saved and loaded beside requests, in slices, and can be stopped anywhere."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_engine import (
    BaseEngine,
    BatchedEngine,
    EngineDead,
    EngineState,
    EngineStopped,
    GenerationError,
    InvalidRequest,
    SimpleEngine,
)
from mlx_engine.core import sliced_job
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.threads import Start
from mlx_engine.engine.local import LocalEngine
from mlx_engine.generation.cache import array_bytes, entry_file, prompt_cache_file, recorded_prompt
from mlx_engine.generation.cache.entry_file import EntryReader, EntryWriter
from mlx_engine.generation.cache.prompt_cache import PromptCache
from mlx_engine.remote.serving.heartbeats import Heartbeats
from tests.conftest import settled
from tests.engine.test_prompt_caching import ask, tokens_of
from tests.waiting import PATIENCE, turns, until

pytestmark = pytest.mark.anyio

PROMPTS = [tokens_of(60 + seed, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array has a turn of its own, and is written in several pieces."""
    monkeypatch.setattr(array_bytes, "_SLICE", 1)
    monkeypatch.setattr(entry_file, "PIECE", 5000)


class Disk:
    """A disk that stands still at a chosen write or read of a file.

    Attributes:
        count: writes and reads until now.
        stands: set when it does.
    """

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.stands = threading.Event()
        self._go = threading.Event()

    def touch(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.stands.set()
            assert self._go.wait(PATIENCE)

    async def reached(self) -> None:
        await until(self.stands.is_set, "the disk was not used")

    def go(self) -> None:
        self.at = None
        self._go.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made, write, fill = Disk(), EntryWriter.write, EntryReader._fill

    def noted_write(writer: EntryWriter, data: memoryview) -> None:
        made.touch()
        write(writer, data)

    def noted_fill(reader: EntryReader, start: int, data: memoryview) -> None:
        made.touch()
        fill(reader, start, data)

    monkeypatch.setattr(EntryWriter, "write", noted_write)
    monkeypatch.setattr(EntryReader, "_fill", noted_fill)
    yield made
    made.go()


@pytest.fixture
async def filled(engine: BaseEngine) -> BaseEngine:
    """With three prompts in its cache."""
    for prompt in PROMPTS:
        await ask(engine, prompt)
    return engine


def only(folder: Path, *names: str) -> bool:
    return sorted(os.listdir(folder)) == sorted(names)


@pytest.mark.parametrize("at", [1, 4, 13])
async def test_requests_go_on_while_the_disk_stands_still(
    filled: BaseEngine, tmp_path: Path, disk: Disk, at: int
) -> None:
    expected = (await ask(filled, PROMPTS[0])).tokens
    disk.at = at
    saving = asyncio.create_task(filled.save_prompt_cache(tmp_path / "cache"))
    await disk.reached()
    assert filled.stats().running == 1
    for _ in range(2):
        assert (await ask(filled, PROMPTS[0])).tokens == expected
    assert not saving.done()
    assert not (tmp_path / "cache").exists()
    disk.go()
    assert await saving == 3
    assert only(tmp_path, "cache")
    stats = filled.stats()
    assert (stats.running, stats.waiting, stats.failed, stats.cancelled) == (0, 0, 0, 0)


async def test_and_while_it_stands_still_in_a_load(
    filled: BaseEngine, engine_type: type[BaseEngine], tiny_path: Path, tmp_path: Path, disk: Disk
) -> None:
    expected = (await ask(filled, PROMPTS[0])).tokens
    await filled.save_prompt_cache(tmp_path / "cache")
    async with engine_type(tiny_path) as other:
        disk.at = disk.count + 40
        loading = asyncio.create_task(other.load_prompt_cache(tmp_path / "cache"))
        await disk.reached()
        assert (await ask(other, PROMPTS[0])).tokens == expected
        disk.go()
        assert await loading == 3
        for prompt in PROMPTS:
            assert (await ask(other, prompt)).usage.cached_tokens == len(prompt) - 1


async def test_a_save_takes_a_turn_between_the_steps_of_a_stream(
    batched_type: type[BaseEngine], tiny_path: Path, tmp_path: Path, disk: Disk
) -> None:
    async with batched_type(tiny_path) as engine:
        await ask(engine, PROMPTS[0])
        async with engine.stream_generate(PROMPTS[1], max_tokens=4000, ignore_eos=True) as stream:
            seen: list[int] = []
            saving: asyncio.Task[int] | None = None
            async for _ in stream:
                if saving is None:
                    saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
                seen.append(disk.count)
                if saving.done():
                    break
            assert saving is not None
            assert await saving >= 1
            assert len(set(seen)) > 3, "there were tokens between its slices"


async def test_cancelled_at_any_write_it_leaves_the_old_file_and_nothing_else(
    filled: BaseEngine, tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "cache"
    assert await filled.save_prompt_cache(path) == 3
    old, writes = path.read_bytes(), disk.count
    assert writes > 10
    await ask(filled, tokens_of(50, 7))
    for at in range(1, writes + 1):
        disk.count, disk.at, disk.stands, disk._go = 0, at, threading.Event(), threading.Event()
        saving = asyncio.create_task(filled.save_prompt_cache(path))
        await disk.reached()
        for _ in range(3):
            saving.cancel()
            await turns()
        assert not saving.done(), "its thread is still at work"
        disk.go()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert path.read_bytes() == old
        assert only(tmp_path, "cache")
    assert filled.stats().cancelled == writes
    assert await filled.save_prompt_cache(path) == 4


async def test_cancelled_at_any_read_it_has_added_whole_prompts_or_none(
    filled: BaseEngine, engine_type: type[BaseEngine], tiny_path: Path, tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "cache"
    await filled.save_prompt_cache(path)
    expected = [(await ask(filled, prompt)).tokens for prompt in PROMPTS]
    added = set()
    async with engine_type(tiny_path) as other:
        await other.load_prompt_cache(path)
        first = disk.count
        disk.count = 0
        await other.load_prompt_cache(path)
        assert 10 < disk.count < first + 10
        for at in range(1, disk.count + 1):
            await other.run_blocking(runner_of(other).prompt_cache.clear)
            disk.count, disk.at, disk.stands, disk._go = 0, at, threading.Event(), threading.Event()
            loading = asyncio.create_task(other.load_prompt_cache(path))
            await disk.reached()
            loading.cancel()
            await turns()
            disk.go()
            with pytest.raises(asyncio.CancelledError):
                await loading
            added.add(other.stats().prompt_cache.entries)
        assert added == {0, 1, 2}
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert (await ask(other, prompt)).tokens == tokens


def runner_of(engine: BaseEngine) -> object:
    assert isinstance(engine, LocalEngine)
    return engine._holder.runner()


async def test_cancelled_before_a_later_turn_it_does_not_wait_for_it(
    filled: BaseEngine, tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "cache"
    disk.at = 3
    saving = asyncio.create_task(filled.save_prompt_cache(path))
    await disk.reached()
    go = threading.Event()
    busy = asyncio.create_task(filled.run_blocking(go.wait, PATIENCE))
    await until(lambda: mlx_thread.locked)
    disk.go()
    await until(lambda: mlx_thread.waiting, "it does not want its next turn")
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert mlx_thread.locked
    assert only(tmp_path)
    go.set()
    await busy


async def test_it_waits_for_its_first_turn_and_leaves_at_once(
    engine: BaseEngine, tmp_path: Path
) -> None:
    go = threading.Event()
    busy = asyncio.create_task(engine.run_blocking(go.wait, PATIENCE))
    await until(lambda: mlx_thread.locked)
    saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
    await until(lambda: engine.stats().waiting == 1)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert mlx_thread.locked
    go.set()
    await busy


async def test_a_stop_ends_it_with_its_error_and_leaves_the_old_file(
    filled: BaseEngine, tmp_path: Path, disk: Disk
) -> None:
    path = tmp_path / "cache"
    await filled.save_prompt_cache(path)
    old = path.read_bytes()
    disk.count, disk.at = 0, 5
    saving = asyncio.create_task(filled.save_prompt_cache(path))
    await disk.reached()
    stopping = asyncio.create_task(filled.stop())
    await turns()
    assert not stopping.done(), "its thread is still at work"
    disk.go()
    with pytest.raises(EngineStopped):
        await saving
    await stopping
    assert filled.state is EngineState.STOPPED
    assert path.read_bytes() == old
    assert only(tmp_path, "cache")


async def test_a_shutdown_lets_it_finish(filled: BaseEngine, tmp_path: Path, disk: Disk) -> None:
    disk.at = 5
    saving = asyncio.create_task(filled.save_prompt_cache(tmp_path / "cache"))
    await disk.reached()
    stopping = asyncio.create_task(filled.shutdown(None))
    await turns()
    disk.go()
    assert await saving == 3
    assert (await stopping).finished == ()
    assert only(tmp_path, "cache")


def test_an_event_loop_that_is_closed_ends_it(tiny_path: Path, tmp_path: Path, disk: Disk) -> None:
    engine = SimpleEngine(tiny_path)
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Task[int]:
        await engine.start()
        await ask(engine, PROMPTS[0])
        disk.at = 2
        saving = asyncio.create_task(engine.save_prompt_cache(tmp_path / "cache"))
        await disk.reached()
        return saving

    saving = loop.run_until_complete(begin())
    loop.close()
    saving._log_destroy_pending = False  # type: ignore[attr-defined]
    del saving
    disk.go()

    async def end() -> None:
        await engine.stop()
        assert engine.stats().running == 0

    asyncio.run(end())
    assert only(tmp_path)


FAULTS: list[tuple[object, str]] = [
    (array_bytes.Copies, "of"),
    (prompt_cache_file, "described_arrays"),
    (PromptCache, "heir"),
]


@pytest.mark.parametrize(("holder", "name"), FAULTS, ids=[name for _, name in FAULTS])
async def test_what_fails_in_a_turn_is_told_and_leaves_nothing(
    filled: BaseEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: object,
    name: str,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[metal] no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, broken)
        with pytest.raises(GenerationError, match=r"saving the prompt cache failed.*no memory"):
            await filled.save_prompt_cache(tmp_path / "cache")
    assert only(tmp_path)
    assert await filled.save_prompt_cache(tmp_path / "cache") == 3
    with monkeypatch.context() as patch:
        patch.setattr(recorded_prompt.RecordedPrompt, "arrays_in", broken)
        with pytest.raises(GenerationError, match=r"loading the prompt cache failed.*no memory"):
            await filled.load_prompt_cache(tmp_path / "cache")
    assert await filled.load_prompt_cache(tmp_path / "cache") == 3


async def test_without_a_thread_it_fails_and_does_not_hang(
    filled: BaseEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never(Start):
        def begin(self) -> None:
            self._fail(RuntimeError("can't start new thread"))

    class Late(Start):
        def begin(self) -> None:
            asyncio.get_running_loop().call_later(0.05, self.give_up)

    for kind in (Never, Late):
        monkeypatch.setattr(sliced_job, "Start", kind)
        with pytest.raises(EngineDead, match="a thread cannot be started"):
            await filled.save_prompt_cache(tmp_path / "cache")
        assert only(tmp_path)
        assert filled.stats().running == filled.stats().waiting == 0
    monkeypatch.setattr(sliced_job, "Start", Start)
    assert await filled.save_prompt_cache(tmp_path / "cache") == 3


async def test_each_piece_is_a_beat_for_the_watchdog(
    filled: BaseEngine, tmp_path: Path, disk: Disk
) -> None:
    assert isinstance(filled, LocalEngine)
    heartbeats = Heartbeats()
    heartbeats.engine = filled
    before = heartbeats.heartbeat().progress
    await filled.save_prompt_cache(tmp_path / "cache")
    saved = heartbeats.heartbeat().progress
    assert saved >= before + disk.count > before
    writes = disk.count
    await filled.load_prompt_cache(tmp_path / "cache")
    assert heartbeats.heartbeat().progress >= saved + disk.count - writes


@pytest.mark.parametrize("also", ["save", "load"])
async def test_several_at_once_are_all_done(filled: BaseEngine, tmp_path: Path, also: str) -> None:
    await filled.save_prompt_cache(tmp_path / "cache")
    act: Callable[[Path], object] = getattr(filled, f"{also}_prompt_cache")
    done = await asyncio.gather(
        *(filled.save_prompt_cache(tmp_path / "cache") for _ in range(3)),
        *(act(tmp_path / "cache") for _ in range(3)),  # type: ignore[arg-type]
        filled.generate(PROMPTS[1], max_tokens=5),
    )
    assert done[:6] == [3] * 6
    await settled()
    assert only(tmp_path, "cache")


async def test_loaded_prompts_give_way_to_requests_one_by_one(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    async with SimpleEngine(tiny_path) as simple:
        for seed in range(6):
            await ask(simple, tokens_of(500, seed))
        assert await simple.save_prompt_cache(tmp_path / "cache") == 6
        size = simple.stats().prompt_cache.nbytes
    async with BatchedEngine(tiny_path, kv_cache_memory_bytes=size // 2) as engine:
        store = PromptCache.store

        def noted(cache: PromptCache, *args: object, **kwargs: object) -> bool:
            most.append(cache.nbytes)
            return store(cache, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(PromptCache, "store", noted)
        assert await engine.load_prompt_cache(tmp_path / "cache") == 6
        assert max(most) <= size // 2
        assert 0 < engine.stats().prompt_cache.nbytes <= size // 2


async def test_a_damaged_file_is_refused_by_the_engine(filled: BaseEngine, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    await filled.save_prompt_cache(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    before = filled.stats().prompt_cache
    with pytest.raises(InvalidRequest, match="the checksum is wrong"):
        await filled.load_prompt_cache(path)
    assert filled.stats().prompt_cache == before
