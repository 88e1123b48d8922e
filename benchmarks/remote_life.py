"""What ``benchmarks.remote`` asks besides speed: how late the event loop is, and the end.

Lateness of the application's event loop, for about a second at a time, in rounds: idle, and
while 8 streams or 8 whole answers are made in process or by a ``ProcessEngine``. On a machine
with few processors the system lets a process wait when others work, whoever they are. What is
due to that, and not to this library, the controls tell: while another program, which nobody here
speaks with, makes such answers, and while plain child processes keep one processor busy, and
two. Two probes, in runs of their own:

    handed over  another thread hands the loop a callback each millisecond, as the I/O thread of
                 an engine does; how long it waits
    asleep       a coroutine sleeps a millisecond at a time; how much longer that takes. Linux's
                 epoll rounds waits up to whole milliseconds, so that any other event in the
                 loop makes it up to one late.

The end: 8 streams are under way, and SIGKILL ends the engine's process. Measured from there:
until the first and the last reader have their ``EngineDead``; until the first token of a new
request, after ``stop()`` and ``start()``, and from an ``EngineManager`` with one replica that
restarts it without a wait (``RestartPolicy.backoff``, 0.5 s unless set, comes on top of that).
Beside it, what a Python takes that does nothing, and one that imports mlx_lm.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.batch_ways import WAYS, Load
from benchmarks.overhead import TICK, Probe
from benchmarks.remote_places import pid_of, process_engine, seconds_of
from benchmarks.report import markdown_table
from benchmarks.setting import Setting, rotated
from benchmarks.spread import Spread
from benchmarks.throughput import make_prompts
from mlx_engine import BatchedEngine, EngineDead, ProcessEngine
from mlx_engine.remote.replicas.manager import EngineManager
from mlx_engine.remote.replicas.restarts import RestartPolicy

AT_ONCE = 8
IDLE, OTHER_PROGRAM = "idle", "another program generating"
ERROR_TARGET = 0.050  # seconds from SIGKILL to the last EngineDead


@dataclass(frozen=True, slots=True)
class Round:
    """One state for about a second.

    Attributes:
        late: seconds of each sample.
        here: processors that this process kept busy.
        there: those that the engine's process did; ``None`` if that cannot be known.
    """

    late: list[float]
    here: float
    there: float | None

    def percentile(self, percent: float) -> float:
        return Spread.of(self.late).percentile(percent)


Probing = Callable[[], "Probe | Ticker"]
Lateness = dict[str, dict[str, list[Round]]]  # by probe, and by state


class Ticker:
    """A coroutine that sleeps a millisecond at a time, while entered.

    Attributes:
        late: seconds that each sleep was longer.
    """

    def __init__(self) -> None:
        self.late: list[float] = []

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.late.append(time.perf_counter() - due)

    def __enter__(self) -> Ticker:
        self._task = asyncio.create_task(self._tick())
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()


PROBES: dict[str, Probing] = {"handed over": Probe, "asleep": Ticker}


@dataclass(frozen=True, slots=True)
class State:
    """What goes on while the loop is probed.

    Attributes:
        engine: what makes 8 answers, again and again.
        way: of ``benchmarks.batch_ways``.
        beside: processes that go on meanwhile, and are stopped otherwise.
    """

    engine: Any = None
    way: str = ""
    beside: Sequence[subprocess.Popen[str]] = ()

    async def go_on(self, load: Load, seconds: float) -> None:
        end = time.perf_counter() + seconds
        if self.engine is None:
            await asyncio.sleep(seconds)
        while time.perf_counter() < end:
            await WAYS[self.way](self.engine, load)

    async def probed(self, probe: Probing, load: Load, seconds: float) -> Round:
        pid = pid_of(self.engine) if isinstance(self.engine, ProcessEngine) else None
        for process in self.beside:
            process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.1)
        start, here = time.perf_counter(), time.process_time()
        there = None if pid is None else seconds_of(pid)
        with probe() as probing:
            await self.go_on(load, seconds)
        wall = time.perf_counter() - start
        here = (time.process_time() - here) / wall
        if pid is not None and there is not None:
            there = ((seconds_of(pid) or there) - there) / wall
        for process in self.beside:
            process.send_signal(signal.SIGSTOP)
        return Round(probing.late, here, there)


@contextmanager
def stopped_program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that has said a line and was stopped then.

    It has a session of its own, as an engine's process has: Linux may share processors out
    between sessions.
    """
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("a program of the controls has ended at once")
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


async def generate_for_ever(model: str) -> None:
    """What another program does; see ``stopped_program``."""
    parent, load = os.getppid(), Load(make_prompts()[:AT_ONCE], 48)
    async with BatchedEngine(model, prompt_cache_bytes=0) as engine:
        await WAYS["generate"](engine, load)
        print("ready", flush=True)
        while os.getppid() == parent:
            await WAYS["generate"](engine, load)


async def measure_lateness(model: str, setting: Setting) -> Lateness:
    seconds = 0.3 if setting.quick else 1.0
    load = Load(make_prompts()[:AT_ONCE], 16 if setting.quick else 48)
    burn = "import os; us = os.getppid(); print(flush=True)\nwhile os.getppid() == us: pass"
    async with AsyncExitStack() as stack:
        burners = [stack.enter_context(stopped_program("-c", burn)) for _ in range(2)]
        name = "benchmarks.remote_life"
        program = stack.enter_context(stopped_program("-m", name, model))
        process = await stack.enter_async_context(process_engine(model))
        here = await stack.enter_async_context(BatchedEngine(model, prompt_cache_bytes=0))
        states = {
            IDLE: State(),
            OTHER_PROGRAM: State(beside=(program,)),
            "one processor busy": State(beside=burners[:1]),
            "two processors busy": State(beside=burners),
            "in process, streams": State(here, "stream"),
            "in process, whole answers": State(here, "generate"),
            "ProcessEngine, streams": State(process, "stream"),
            "ProcessEngine, whole answers": State(process, "generate"),
        }
        late: Lateness = {probe: {name: [] for name in states} for probe in PROBES}
        for state in (State(here, "stream"), State(process, "stream")):  # warm-up
            await state.go_on(load, 0.1)
        for turn in range(setting.repeats):
            for probe, make in PROBES.items():
                for name in rotated(list(states), turn):
                    late[probe][name].append(await states[name].probed(make, load, seconds))
    return late


def p99s(states: dict[str, list[Round]]) -> dict[str, Spread]:
    """By state, of each round."""
    return {
        name: Spread.of(one.percentile(99) for one in rounds) for name, rounds in states.items()
    }


def p99_ratio(states: dict[str, list[Round]], name: str, to: str) -> Spread:
    """Within each round."""
    pairs = zip(states[name], states[to], strict=True)
    return Spread.of(a.percentile(99) / b.percentile(99) for a, b in pairs)


def lateness_table(late: Lateness) -> str:
    made = []
    for probe, states in late.items():
        rows = []
        for name, rounds in states.items():
            at = [Spread.of(one.percentile(p) for one in rounds) for p in (50, 99, 100)]
            row = [name, *(spread.text(2, 1e3) for spread in at)]
            row += [p99_ratio(states, name, to).text(2) for to in (IDLE, OTHER_PROGRAM)]
            there = [one.there for one in rounds if one.there is not None]
            row.append(Spread.of(one.here for one in rounds).text(2))
            rows.append([*row, Spread.of(there).text(2) if there else ""])
        head = [f"{probe}, while", "p50 ms", "p99 ms", "max ms", "p99 of idle"]
        head += ["p99 of the other program's", "processors here", "in the child"]
        made.append(markdown_table(head, rows))
    return "\n\n".join(made)


def lateness_record(late: Lateness) -> dict[str, Any]:
    def one(states: dict[str, list[Round]], name: str) -> dict[str, Any]:
        rounds = states[name]
        return {
            "samples": sum(len(one.late) for one in rounds),
            "p50": Spread.of(one.percentile(50) for one in rounds).record(),
            "p99": p99s(states)[name].record(),
            "max": Spread.of(one.percentile(100) for one in rounds).record(),
            "p99_ratio_to_idle": p99_ratio(states, name, IDLE).record(),
            "p99_ratio_to_other_program": p99_ratio(states, name, OTHER_PROGRAM).record(),
            "processors_here": [one.here for one in rounds],
            "processors_of_child": [one.there for one in rounds],
        }

    return {probe: {name: one(states, name) for name in states} for probe, states in late.items()}


@dataclass(slots=True)
class Kills:
    """Seconds from SIGKILL, one value a kill, and of starts."""

    first_error: list[float] = field(default_factory=list)
    last_error: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    stop_and_start: list[float] = field(default_factory=list)
    manager: list[float] = field(default_factory=list)
    bare_python: list[float] = field(default_factory=list)
    import_mlx_lm: list[float] = field(default_factory=list)

    def spreads(self) -> dict[str, Spread]:
        """By what was measured."""
        return {
            f"SIGKILL to the first of {AT_ONCE} EngineDead": Spread.of(self.first_error),
            "SIGKILL to the last of them": Spread.of(self.last_error),
            "SIGKILL to the first token after stop() and start()": Spread.of(self.stop_and_start),
            "the start() in that": Spread.of(self.start),
            "SIGKILL to the first token of an EngineManager": Spread.of(self.manager),
            "python -c pass": Spread.of(self.bare_python),
            "python -c 'import mlx_lm'": Spread.of(self.import_mlx_lm),
        }


async def first_token(engine: Any) -> None:
    """Wait for the first token of a new request."""
    async with engine.stream_generate(make_prompts()[0], max_tokens=2) as stream:
        await anext(stream)


async def killed(engine: Any, process: ProcessEngine) -> tuple[float, list[float]]:
    """Kill the process with streams under way: when, and when each reader knew."""
    under_way = [asyncio.Event() for _ in range(AT_ONCE)]

    async def read(prompt: list[int], flows: asyncio.Event) -> float:
        try:
            async with engine.stream_generate(prompt, max_tokens=8000, ignore_eos=True) as stream:
                async for _ in stream:
                    flows.set()
        except EngineDead:
            return time.perf_counter()
        raise SystemExit("a stream of a killed process has ended as if it were complete")

    readers = [
        asyncio.create_task(read(prompt, flows))
        for prompt, flows in zip(make_prompts(), under_way, strict=False)
    ]
    for flows in under_way:
        await flows.wait()
    start = time.perf_counter()
    os.kill(pid_of(process), signal.SIGKILL)
    return start, list(await asyncio.gather(*readers))


async def measure_kills(model: str, setting: Setting) -> Kills:
    kills = Kills()
    engine = process_engine(model)
    await engine.start()
    for _ in range(3 if setting.quick else 20):
        start, known = await killed(engine, engine)
        kills.first_error.append(min(known) - start)
        kills.last_error.append(max(known) - start)
        await engine.stop()
        begin = time.perf_counter()
        await engine.start()
        kills.start.append(time.perf_counter() - begin)
        await first_token(engine)
        kills.stop_and_start.append(time.perf_counter() - start)
    await engine.stop()
    logging.getLogger("mlx_engine").setLevel(logging.ERROR)  # it warns of each end
    at_once = RestartPolicy(backoff=0, max_restarts=100)
    manager = EngineManager(model, engine="batched", restart=at_once, prompt_cache_bytes=0)
    async with manager:
        for _ in range(2 if setting.quick else 5):
            (replica,) = manager._supervisor.everyone
            assert isinstance(replica.engine, ProcessEngine)
            start, _known = await killed(manager, replica.engine)
            await first_token(manager)
            kills.manager.append(time.perf_counter() - start)
            kills.bare_python.append(seconds_to_run("pass"))
            kills.import_mlx_lm.append(seconds_to_run("import mlx_lm"))
    return kills


def seconds_to_run(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def kills_table(kills: Kills) -> str:
    known = kills.spreads().items()
    rows = [[what, spread.text(1, 1e3), str(len(spread.values))] for what, spread in known]
    worst, limit = max(kills.last_error) * 1e3, ERROR_TARGET * 1e3
    verdict = "kept" if worst < limit else "missed"
    said = f"Target: EngineDead within {limit:.0f} ms: {verdict} (slowest {worst:.1f} ms)."
    return f"{markdown_table(['what', 'ms', 'times'], rows)}\n\n{said}"


if __name__ == "__main__":
    asyncio.run(generate_for_ever(sys.argv[1]))
