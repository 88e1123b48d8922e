"""Where the engines are that ``benchmarks.remote`` compares, and the processor time they take."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.batch_ways import ROWS, WAYS, Answer, Load
from benchmarks.throughput import check
from mlx_engine import BatchedEngine, ProcessEngine
from mlx_engine.remote.ray_engine import RayEngine
from mlx_engine.remote.remote_engine import RemoteEngine

HERE = "in process"
SHAPES = {"streams": WAYS["stream"], "whole answers": WAYS["generate"]}

_OPTIONS: Any = {"max_batch_size": ROWS, "prompt_cache_bytes": 0}
_SETTLE = 0.02  # seconds after a run for what the other processes still have to do for it


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor seconds, of the processes that answer.

    Attributes:
        all: of all their threads.
        talk: of those that do not compute: the application's event loop, the I/O thread, what
            is between, and the event loop of the engine's process.
    """

    all: float
    talk: float

    def a_token_since(self, before: Cpu, tokens: int) -> Cpu:
        """What was taken between two readings, for each of so many tokens."""
        return Cpu((self.all - before.all) / tokens, (self.talk - before.talk) / tokens)


@dataclass(frozen=True, slots=True)
class Place:
    """An engine, and where its work is done.

    Attributes:
        core: the process with the model; ``None`` is this one.
        relays: processes between it and this one.
    """

    engine: Any
    core: int | None = None
    relays: tuple[int, ...] = ()

    def cpu(self) -> Cpu | None:
        """What has been taken by now, if that can be known."""
        here = time.process_time()
        loop = seconds_of_main_thread(os.getpid() if self.core is None else self.core)
        between = [seconds_of(pid) for pid in self.relays]
        core = 0.0 if self.core is None else seconds_of(self.core)
        if loop is None or core is None or None in between:
            return None
        relays = sum(filter(None, between))
        return Cpu(here + relays + core, loop if self.core is None else here + relays + loop)


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run.

    Attributes:
        rate: tokens a second, from the submission of all to the end of the last.
        first_token: seconds from the submission of all, median over the requests; by the
            reader's clock for streams, by the engine's for whole answers.
        step: seconds from one token of a request to the next.
        cpu: of a token; ``None`` if that cannot be known.
    """

    rate: float
    first_token: float
    step: float
    cpu: Cpu | None


async def timed(name: str, place: Place, shape: str, load: Load, expected: Any) -> Run:
    """Submit the load and wait for all answers, which must be ``expected``."""
    before, start = place.cpu(), time.perf_counter()
    answer: Answer = await SHAPES[shape](place.engine, load)
    seconds = time.perf_counter() - start
    await asyncio.sleep(_SETTLE)
    after = place.cpu()
    check(f"{name}, {shape}", answer.tokens, expected)
    return Run(
        load.tokens / seconds,
        statistics.median(answer.first),
        max(answer.decode) / (load.count - 1),
        None if before is None or after is None else after.a_token_since(before, load.tokens),
    )


def seconds_of(pid: int) -> float | None:
    """Processor time of a process with all its threads; ``None`` where only ``ps`` knows it."""
    if not sys.platform.startswith("linux"):
        return None
    # What clock_getcpuclockid(3) gives; /proc counts in hundredths of a second.
    return time.clock_gettime((~pid << 3) | 2)


def seconds_of_main_thread(pid: int) -> float | None:
    """Processor time of the main thread of a process; ``None`` where that is not told."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) * 1e-9
    except OSError:
        return None


def pid_of(engine: ProcessEngine) -> int:
    """The process of an engine that runs."""
    pid: int = engine._client.connection.link.pid  # type: ignore[union-attr]
    return pid


@asynccontextmanager
async def started_everywhere(model: str) -> AsyncIterator[dict[str, Place]]:
    """Engines by what to call them, each with the same options, all of them idle."""
    async with AsyncExitStack() as stack:
        here = Place(await stack.enter_async_context(BatchedEngine(model, **_OPTIONS)))
        process = await stack.enter_async_context(process_engine(model))
        socket, host = await stack.enter_async_context(_hosted(model))
        remote = await stack.enter_async_context(RemoteEngine(socket))
        places = {
            HERE: here,
            f"{HERE} again": here,
            "ProcessEngine": Place(process, pid_of(process)),
            "RemoteEngine": Place(remote, host),
        }
        if stack.enter_context(_ray_cluster()):
            ray = await stack.enter_async_context(_ray_engine(model))
            places["RayEngine"] = _ray_place(ray)
        yield places


def process_engine(model: str) -> ProcessEngine:
    """Not started."""
    return ProcessEngine(model, engine="batched", **_OPTIONS)


@asynccontextmanager
async def _hosted(model: str) -> AsyncIterator[tuple[str, int]]:
    """The socket and the process of ``mlx-engine host``."""
    with tempfile.TemporaryDirectory(prefix="mlx", dir="/tmp") as folder:
        path = str(Path(folder, "socket"))
        command = [sys.executable, "-m", "mlx_engine", "host", model, "--socket", path]
        options = [f"--{name.replace('_', '-')}={value}" for name, value in _OPTIONS.items()]
        host = await asyncio.create_subprocess_exec(
            *command, *options, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert host.stderr is not None
            while b"serving" not in (line := await host.stderr.readline()):
                if not line:
                    raise SystemExit("mlx-engine host has ended before it served anything")
            yield path, host.pid
        finally:
            if host.returncode is None:
                host.terminate()
            await host.wait()


@contextmanager
def _ray_cluster() -> Iterator[bool]:
    """A cluster of this machine alone; whether there is one."""
    try:
        ray = import_module("ray")
    except ImportError:
        print("Ray is not installed: RayEngine is left out.")
        yield False
        return
    ray.init(
        "local",  # never a cluster that happens to run here
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield True
    finally:
        ray.shutdown()


def _ray_engine(model: str) -> RayEngine:
    # Ray sets this to num_cpus, and the others have what there is.
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return RayEngine(model, engine="batched", env_vars={"OMP_NUM_THREADS": threads}, **_OPTIONS)


def _ray_place(engine: RayEngine) -> Place:
    """Ray's own daemons are left out: they serve whole clusters."""
    actor: int = engine._client.connection.link.place.pid  # type: ignore[union-attr]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
        if parent == actor:
            return Place(engine, int(stat.parent.name), (actor,))
    return Place(engine, actor)  # no /proc here, so that no processor time is known either
