"""Engines in processes of their own have parts of the memory, which come back when they go."""

from __future__ import annotations

import asyncio
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_engine import (
    BatchedEngine,
    EngineManager,
    EngineStats,
    InvalidRequest,
    MemoryStats,
    MemoryUse,
    NotEnoughMemory,
    ProcessEngine,
    SimpleEngine,
)
from mlx_engine.config import EngineConfig
from mlx_engine.core.ledger import Ledger
from mlx_engine.core.machine import ToldMachine
from mlx_engine.core.reclaim import reclaim
from mlx_engine.core.weight_size import stored_bytes
from mlx_engine.remote.links.ray_link import RayLink
from mlx_engine.remote.links.relay import Place
from mlx_engine.remote.node_part import NodePart
from mlx_engine.remote.part import Part
from mlx_engine.remote.totals import bygone, total
from mlx_engine.remote.wire.messages import Budget, decode_from_client
from tests.memory.machines import machine_of
from tests.waiting import turns, until

pytestmark = pytest.mark.anyio

MIB = 2**20


@dataclass
class Process:
    """The process of an engine, played: it has ``use``, and obeys when it is told to."""

    part: Part
    use: MemoryUse
    limit: int | None = None
    obeys: bool = True
    budgets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.part.begin(self.receive)

    def receive(self, frame: bytes) -> None:
        (budget,) = decode_from_client(frame)
        assert isinstance(budget, Budget)
        self.budgets.append(budget.memory)
        if self.obeys:
            self.tell(budget.memory)

    def tell(self, limit: int) -> None:
        self.limit = limit
        loop = asyncio.get_running_loop()
        loop.call_soon(self.part.told, MemoryStats(limit=limit, use=self.use))


def part(name: str, **options: Any) -> Part:
    return Part(name, EngineConfig.of("simple", "somewhere/model", options))


async def taken(one: Part) -> int | None:
    """What its process is told that it may have, after a start at once."""
    await one.take()
    return one.begin(lambda frame: None)


def claimed(book: Ledger) -> dict[str, int]:
    return {one.name: one.use.processes for one in book.accounts}


async def test_those_that_start_together_get_equal_parts() -> None:
    with machine_of(900) as book:
        parts = [part(name) for name in "abc"]
        assert await asyncio.gather(*map(taken, parts)) == [300, 300, 300]
        assert claimed(book) == {"a": 300, "b": 300, "c": 300}
        for one in parts:
            one.close()
        assert book.accounts == ()


async def test_an_engine_of_this_process_keeps_a_share() -> None:
    with machine_of(1000) as book:
        here = book.account("here")
        assert here.claim("weights", 200)
        assert await taken(part("elsewhere")) == 400
        assert here.room("live") == 360


async def test_one_that_has_all_gives_back_what_it_has_no_use_for() -> None:
    with machine_of(1000) as book:
        first, second = part("first"), part("second")
        assert await taken(first) == 1000
        process = Process(first, MemoryUse(weights=160, stored=300))
        process.tell(1000)
        await asyncio.sleep(0)
        given = await taken(second)
        assert given is not None
        assert 300 <= given <= 500
        assert claimed(book) == {"first": process.budgets[-1], "second": given}
        assert sum(claimed(book).values()) <= 1000
        second.close()
        assert claimed(book) == {"first": 1000}
        assert process.budgets[-1] == 1000


async def test_one_that_is_still_at_its_imports_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.0)
    with machine_of(1000) as book:
        first, second = part("first"), part("second")
        assert await taken(first) == 1000
        process = Process(first, MemoryUse(), obeys=False)
        taking = asyncio.create_task(taken(second))
        await until(lambda: process.budgets, "it was asked")
        await turns()
        assert first.pending
        assert not taking.done()
        first.took(process.budgets[-1] + 1, 0)  # an answer to what was said before
        assert first.pending
        first.took(process.budgets[-1], process.budgets[-1] - 100)
        assert not first.pending
        given = await taking
        assert claimed(book) == {"first": process.budgets[-1], "second": given}
        assert given == 250


async def test_one_whose_process_is_not_there_yet_makes_room_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody has to be asked, or told of more than it gets in the end."""
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.0)
    with machine_of(1000) as book:
        first, second, third = map(part, ("first", "second", "third"))
        await first.take()
        assert claimed(book) == {"first": 1000}
        await second.take()
        assert claimed(book) == {"first": 750, "second": 250}
        second.close()
        assert claimed(book) == {"first": 1000}, "nor has it been told of less"
        await third.take()
        told: list[bytes] = []
        assert first.begin(told.append) == 750
        assert third.begin(told.append) == 250
        assert not told


async def test_one_that_has_more_by_now_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.0)
    with machine_of(1000) as book:
        first, second = part("first"), part("second")
        await first.take()
        process = Process(first, MemoryUse(), obeys=False)
        taking = asyncio.create_task(taken(second))
        await until(lambda: process.budgets, "it was asked")
        first.took(process.budgets[-1], 900)
        assert await taking == 100
        assert claimed(book) == {"first": 900, "second": 100}


async def test_it_keeps_what_it_uses_until_it_tells_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.05)
    monkeypatch.setattr("mlx_engine.core.reclaim._LONGEST", 0.05)
    with machine_of(1000) as book:
        first = part("first")
        await first.take()
        process = Process(first, MemoryUse(weights=160), obeys=False)
        first.told(MemoryStats(limit=1000, use=process.use))
        await reclaim(book, 500)
        assert book.free == 0, "asked, and not answered"
        first.told(MemoryStats(limit=1000, use=process.use))
        assert book.free == 0, "that was said before"
        first.told(MemoryStats(limit=process.budgets[-1], use=MemoryUse(weights=160, live=600)))
        assert claimed(book) == {"first": 760}, "its requests have that by now"
        first.told(MemoryStats(limit=process.budgets[-1], use=MemoryUse(weights=160)))
        assert claimed(book) == {"first": process.budgets[-1]}
        assert (book.free or 0) >= 500


async def test_engines_on_a_node_share_what_the_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the first that comes there; the memory of this machine is not concerned."""
    monkeypatch.setattr("mlx_engine.core.reclaim._LONGEST", 0.0)  # these never answer
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.0)

    async def start(host: str, nbytes: int, **options: Any) -> tuple[NodePart, int | None]:
        made = NodePart("elsewhere", EngineConfig.of("simple", "somewhere/model", options))
        link = RayLink("elsewhere")
        await made.take()
        link.place = Place(host, 1, ToldMachine(nbytes, nbytes - 100))
        await made.place(link)
        return made, made.begin(lambda frame: None)

    with machine_of(10 * MIB) as here:
        (one, first), (other, second) = await asyncio.gather(
            *(start("node 1", 1100) for _ in range(2))
        )
        assert (first, second) == (500, 500)
        third, alone = await start("node 2", 700)
        assert alone == 600
        with pytest.raises(InvalidRequest, match=r"^memory: must be 1100 bytes"):
            await start("node 1", 5000, memory=MIB)
        with pytest.raises(NotEnoughMemory):
            await start("node 1", 5000, memory=0.5)
        one.close()
        other.close()
        one, first = await start("node 1", 2100)
        assert first == 2000, "it has more than before"
        nearby, near = await start(platform.node(), 700)
        assert near == 10 * MIB, "which this process knows better"
        assert here.use.processes == near
        for each in (one, third, nearby):
            each.close()


async def test_what_was_asked_for_in_bytes_is_its_own() -> None:
    with machine_of(10 * MIB) as book:
        one = part("one", memory=6 * MIB)
        assert await taken(one) == 6 * MIB
        Process(one, MemoryUse(weights=10))
        with pytest.raises(NotEnoughMemory, match=r"^two needs 5242880 .* 4194304 are left") as bad:
            await part("two", memory=0.5).take()
        assert (bad.value.needed, bad.value.available) == (5 * MIB, 4 * MIB)
        assert list(claimed(book)) == ["one"]
        with pytest.raises(InvalidRequest, match=r"^memory: must be 10485760 bytes at most"):
            await part("two", memory=11 * MIB).take()
        assert await taken(part("two")) == 4 * MIB


async def test_where_nothing_is_known_nothing_is_bounded() -> None:
    with machine_of(None):
        assert await taken(part("one")) is None
        assert await taken(part("two")) is None


async def test_a_start_that_is_cancelled_takes_nothing() -> None:
    with machine_of(1000) as book:
        start = asyncio.ensure_future(part("one").take())
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert book.accounts == ()


async def test_a_model_that_cannot_fit_is_refused_before_a_process_is_started(
    tiny_path: Path,
) -> None:
    weights = stored_bytes(tiny_path)
    with machine_of(weights - 1) as book:
        engine = ProcessEngine(tiny_path)
        with pytest.raises(NotEnoughMemory) as caught:
            await engine.start()
        assert (caught.value.needed, caught.value.available) == (weights, weights - 1)
        assert engine.last_exit is None
        assert engine.state == "created"
        assert book.accounts == ()


async def test_two_processes_and_an_engine_here_share_the_machine(tiny_path: Path) -> None:
    total_ = 64 * MIB
    with machine_of(total_) as book:
        async with ProcessEngine(tiny_path, name="a") as a:
            assert a.stats().memory.limit == total_, "alone, it has all"
            assert [owner.name for owner in a.stats().memory.owners] == ["a"]
            async with BatchedEngine(tiny_path) as here:
                assert claimed(book)["a"] < total_
                room = here.stats().memory
                assert room.total == total_
                async with ProcessEngine(tiny_path, name="b", engine="batched") as b:
                    parts = claimed(book)
                    await until(
                        lambda: a.stats().memory.limit == parts["a"], "it was not told of that"
                    )
                    assert b.stats().memory.limit == parts["b"] > 4 * MIB
                    use = book.use
                    assert use.models + use.caches / 0.9 <= total_
                    answers = await asyncio.gather(
                        *(one.generate("hi", max_tokens=3) for one in (a, b, here))
                    )
                    assert len({answer.tokens for answer in answers}) == 1
                assert "b" not in claimed(book)
        assert book.use == MemoryUse()


async def test_a_manager_gives_each_replica_its_part(tiny_path: Path) -> None:
    total_ = 64 * MIB
    with machine_of(total_) as book:
        async with EngineManager(tiny_path, replicas=2) as manager:
            assert claimed(book) == {"replica-1": total_ // 2, "replica-2": total_ // 2}
            memory = manager.stats().memory
            assert memory.limit == total_
            assert memory.use.weights == 2 * _weights(manager)
            assert sorted(owner.name for owner in memory.owners) == ["replica-1", "replica-2"]
            await manager.scale(3)
            parts = claimed(book)
            assert len(parts) == 3
            assert sum(parts.values()) <= total_
            assert min(parts.values()) > total_ // 5
            await manager.scale(1)
            (left,) = claimed(book).values()
            assert left > total_ * 3 // 4, "what the others had comes back"
            assert (await manager.generate("hi", max_tokens=2)).tokens
        assert book.accounts == ()


def _weights(manager: EngineManager) -> int:
    return next(iter(manager.replica_stats().values())).memory.use.weights


async def test_a_process_that_is_killed_gives_its_part_back(tiny_path: Path) -> None:
    with machine_of(64 * MIB) as book:
        engine = ProcessEngine(tiny_path)
        await engine.start()
        engine.kill()
        await engine.wait_exit()
        assert book.accounts == ()
        await engine.stop()
        async with engine:
            assert book.use.processes == 64 * MIB


def test_the_memory_of_several_is_added_up() -> None:
    def stats(memory: MemoryStats) -> EngineStats:
        empty = SimpleEngine("demo").stats()
        return EngineStats(**{**{n: getattr(empty, n) for n in empty.__slots__}, "memory": memory})

    one = MemoryStats(100, 50, MemoryUse(weights=10, live=5), 20, 1, "shrink")
    other = MemoryStats(100, 30, MemoryUse(weights=10), 12, 2, "stop")
    both = total("running", [stats(one), stats(other)]).memory  # type: ignore[arg-type]
    assert both == MemoryStats(100, 80, MemoryUse(weights=20, live=5), 32, 3, "stop")
    assert bygone(stats(one)).memory == MemoryStats(refused=1)


async def test_one_that_starts_while_another_loads_has_its_part(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes a process seconds, in which it has no engine that could tell."""
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.0)
    with machine_of(64 * MIB) as book:
        first, second = ProcessEngine(tiny_path), ProcessEngine(tiny_path)
        loading = asyncio.create_task(first.start())
        await until(lambda: book.use.processes == 64 * MIB, "the first has all")
        await until(lambda: (pid := first.pid) is not None and pid > 0, "and a process")
        async with second:
            await loading
            async with first:
                assert book.use.processes <= 64 * MIB
                assert min(one.use.processes for one in book.accounts) > 8 * MIB
                for engine in (first, second):
                    assert (await engine.generate("a", max_tokens=2)).tokens
