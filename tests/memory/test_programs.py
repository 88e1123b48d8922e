"""Random programs on a machine that is played: the sum stays within it, and everybody ends.

``MLX_ENGINE_MEMORY_PROGRAMS`` is how many of them there are; ``MLX_ENGINE_MEMORY_SEED`` makes
them others.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mlx_engine.config import EngineConfig
from mlx_engine.core.ledger import Ledger
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.pressure import Level, PressureWatch
from mlx_engine.core.work import ThreadJob
from mlx_engine.errors import InvalidRequest, NotEnoughMemory
from mlx_engine.generation import batch
from mlx_engine.memory_stats import MemoryUse
from mlx_engine.remote.part import Part
from mlx_engine.strategies import DraftModel, SpecPrefill, Strategies
from tests.memory.machines import machine_of
from tests.memory.simulated import TOKEN, Batched, Decoding, Prefilling, Process, Request, Simple

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

PROGRAMS = int(os.environ.get("MLX_ENGINE_MEMORY_PROGRAMS", "1000"))
SEED = int(os.environ.get("MLX_ENGINE_MEMORY_SEED", "0"))
ENOUGH = 20_000  # turns in which all must have ended


def tokens(count: int) -> int:
    """Bytes of so many."""
    return count * TOKEN


which = st.integers(0, 3)
used = st.integers(0, 4000).map(tokens)
memory = st.none() | st.none() | st.sampled_from([2**20, 2 * 2**20])
asked = st.tuples(
    st.just("request"),
    which,
    st.integers(1, 5),
    st.sampled_from([1, 50, 250, 600, 1200]),
    st.sampled_from([0, 30, 600, None, None, None]),
    st.sampled_from([40, 300, 700, 700]),
    st.integers(0, 2),
    st.sampled_from(["plain", "plain", "draft", "sparse"]),
)
turns = st.tuples(st.just("turns"), st.sampled_from([1, 5, 40, 300]))
opened = st.tuples(
    st.just("engine"),
    st.sampled_from([Batched, Batched, Simple]),
    memory,
    st.sampled_from([20, 100, 100, 2000]).map(tokens),
    st.integers(0, 1),
)
rest = st.one_of(
    opened,
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("fault"), which, st.integers(0, 60)),
    st.tuples(st.just("close"), which),
    st.tuples(st.just("process"), memory, st.sampled_from([0, 300, 1000]).map(tokens)),
    st.tuples(st.just("work"), which, used, used),
    st.tuples(st.just("receive"), which),
    st.tuples(st.just("exit"), which),
    st.tuples(st.just("pressure"), st.sampled_from(["normal", "warning", "critical"])),
)
step = st.integers(0, 9).flatmap(lambda n: asked if n < 3 else turns if n < 6 else rest)
programs = st.tuples(
    st.sampled_from([1_500, 2_500, 3_500, 5_000]).map(tokens),
    st.builds(
        lambda *parts: [step for part in parts for step in part],
        st.lists(opened, min_size=1, max_size=2),
        st.lists(step, min_size=6, max_size=30),
    ),
)


class World:
    """One program on one machine."""

    def __init__(self, book: Ledger, watch: PressureWatch) -> None:
        self._book, self._watch = book, watch
        self.engines: list[Batched | Simple] = []
        self.requests: list[Request] = []
        self.processes: list[Process] = []

    async def do(self, name: str, *args: Any) -> None:
        """One step of it."""
        if name == "engine":
            self._open(*args)
        elif name == "process":
            await self._start(*args)
        elif name == "turns":
            for _ in range(args[0]):
                self.turn()
        elif name == "pressure":
            self._watch.source.said = args[0]  # type: ignore[attr-defined]
            self._watch.look()
        elif name == "cancel" and self.requests:
            self.requests[args[0] % len(self.requests)].should_stop = True
        elif name in ("work", "receive", "exit") and self.processes:
            process = self.processes[args[0] % len(self.processes)]
            if name == "work":
                process.work(*args[1:])
            elif name == "receive":
                process.receive()
            else:
                self.processes.remove(process)
                process.part.close()
        elif name in ("request", "fault", "close") and self.engines:
            engine = self.engines[args[0] % len(self.engines)]
            if name == "request":
                for _ in range(args[1]):
                    self._submit(engine, *args[2:])
            elif name == "fault":
                engine.runner.fails_after = args[1]
            else:
                self.engines.remove(engine)
                engine.close()
        self.check()

    def _open(self, kind: type[Batched | Simple], *args: Any) -> None:
        before = self._book.use
        try:
            self.engines.append(kind(f"engine {len(self.engines)}", *args))
        except (NotEnoughMemory, InvalidRequest):
            assert self._book.use.models == before.models

    async def _start(self, memory: int | None, weights: int) -> None:
        options = {} if memory is None else {"memory": memory}
        part = Part("elsewhere", EngineConfig.of("simple", "somewhere/model", options))
        start = asyncio.ensure_future(part.take())
        while not start.done():
            for number, process in enumerate(self.processes):
                if number % 2:
                    process.receive()
                else:  # it has other things to do, and takes what it may
                    process.work(process.limit * 3 // 4, process.use.stored)
            self.check()
            await asyncio.sleep(0)
        try:
            start.result()
        except (NotEnoughMemory, InvalidRequest):
            return
        self.processes.append(Process(part, weights))

    def _submit(
        self, engine: Batched | Simple, length: int, limit: int | None, end: int, *rest: Any
    ) -> None:
        priority, kind = rest
        strategies = Strategies()
        if kind == "draft" and isinstance(engine, Batched):
            strategies = Strategies(decode=DraftModel("draft", 2))
        elif kind == "sparse" and isinstance(engine, Batched):
            strategies = Strategies(prefill=SpecPrefill("draft", threshold=200))
        if isinstance(engine, Simple) and limit == 0:
            limit = 1
        request = Request(length, limit, end, priority, strategies)
        self.requests.append(request)
        engine.submit(request)

    def turn(self) -> bool:
        """Every engine does something; whether anything has happened."""
        self._book.relieve()
        happened = False
        for engine in self.engines:
            over = sum(request.over for request in engine.requests)
            happened |= engine.turn(self._book)
            happened |= sum(request.over for request in engine.requests) > over
            self.check()
        return happened

    def check(self) -> None:
        """Nobody has more than there is, and the books are right."""
        use, total = self._book.use, self._book.total
        assert total is not None
        assert use.models + use.caches / 0.9 <= total
        assert use == sum((one.use for one in self._book.accounts), MemoryUse())
        for account in self._book.accounts:
            if account.limit is not None:
                assert account.use.models + account.use.caches / 0.9 <= account.limit
        there = [process.use.total for process in self.processes]
        assert sum(there) <= use.processes, "processes have more than their parts"

    def end(self) -> None:
        """The system has memory again: everybody ends, and nothing is left."""
        self._watch.source.said = "normal"  # type: ignore[attr-defined]
        for _ in range(3):
            self._watch.look()
        for _ in range(ENOUGH):
            if all(request.over for request in self.requests):
                break
            if not self.turn():  # unless a process has their memory, which was asked for in bytes
                assert self.processes, "those that have not ended do not go on"
                self.processes.pop().part.close()
        assert all(request.over for request in self.requests)
        for engine in self.engines:
            if isinstance(engine, Batched):
                assert len(engine.batch) == 0
            assert engine.memory.account.use.live == 0
            assert engine.memory.account.use.stored == engine.runner.stored_bytes
        for engine in self.engines:
            engine.close()
        for process in self.processes:
            process.part.close()
        assert self._book.use == MemoryUse()
        assert self._book.accounts == ()


class Told:
    """A source of pressure that says what the program has told it."""

    said: Level = "normal"

    def level(self) -> Level:
        return self.said


async def run(total: int, program: list[tuple[Any, ...]]) -> None:
    with machine_of(total) as book:
        world = World(book, PressureWatch(Told()))
        for step in program:
            await world.do(*step)
        world.end()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed, and nobody waits for long for a process that is busy."""
    monkeypatch.setattr(batch, "DecodeBatch", Decoding)
    monkeypatch.setattr(batch, "PrefillQueue", Prefilling)
    monkeypatch.setattr("mlx_engine.core.reclaim._PATIENCE", 0.001)
    monkeypatch.setattr("mlx_engine.core.reclaim._LONGEST", 0.001)
    monkeypatch.setattr("mlx_engine.core.reclaim._LOOK", 0.0)
    monkeypatch.setattr("mlx_engine.engine.engine_memory.watch_pressure", lambda: None)


@seed(SEED)
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(program=programs)
async def test_any_program_stays_within_the_machine_and_everybody_ends(
    played: None, program: tuple[int, list[tuple[Any, ...]]]
) -> None:
    await mlx_thread.run(ThreadJob(lambda: asyncio.run(run(*program))))
