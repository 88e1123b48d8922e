"""What ``benchmarks.soak`` samples every few seconds, and whether it grows."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.soak_load import Tally
from mlx_engine import BatchedEngine


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that is sampled.

    Attributes:
        unit: shown in the table.
        scale: of the value shown.
        slack: growth that is allowed beyond 10 %; ``None``: it may do as it likes.
    """

    unit: str
    scale: float = 1.0
    slack: float | None = None


MIB = 1 / 2**20
MEASURES = {
    "active": Measure("MLX active memory, MiB", MIB, 8 * 2**20),
    "cache": Measure("MLX cached memory, MiB", MIB, 64 * 2**20),
    "resident": Measure("resident memory, MiB", MIB, 20 * 2**20),
    "tasks": Measure("asyncio tasks", 1, 20),
    "threads": Measure("threads", 1, 1),
    "objects": Measure("Python objects, thousands", 1e-3, 5000),
    "prompt_cache": Measure("prompt cache, MiB", MIB),
    "kv": Measure("KV caches of running requests, MiB", MIB),
    "running": Measure("running requests"),
    "batch": Measure("requests that decode together"),
    "waiting": Measure("waiting requests"),
    "rate": Measure("requests a second"),
    "decode_rate": Measure("tokens a second of decode"),
}


@dataclass(slots=True)
class Samples:
    """What was sampled: seconds since the beginning, and a list a measure."""

    times: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in MEASURES})
    stats: list[dict[str, Any]] = field(default_factory=list)

    def thirds(self, name: str) -> tuple[float, float, float]:
        """Medians."""
        values = self.values[name]
        size = max(1, len(values) // 3)
        parts = (values[:size], values[size:-size] or values, values[-size:])
        first, second, last = map(statistics.median, parts)
        return first, second, last

    def grown(self, name: str) -> bool:
        slack = MEASURES[name].slack
        _, second, last = self.thirds(name)
        return slack is not None and last > 1.1 * second + slack


def resident_bytes() -> int:
    """Of this process, now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    shown = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
    )
    return int(shown.stdout) * 1024


class Sampler:
    """Takes the samples."""

    def __init__(self, engine: BatchedEngine, tally: Tally) -> None:
        self._engine = engine
        self._tally = tally
        self._start = self._last = time.monotonic()
        self._requests = 0
        self._decoded = (0, 0.0)
        self.samples = Samples()

    async def sample(self) -> None:
        active, cache = await self._engine.run_blocking(_mlx_memory)
        now = time.monotonic()
        stats = asdict(self._engine.stats())
        requests = self._tally.requests
        decoded = stats["completion_tokens"], stats["decode_seconds"]
        tokens, seconds = (new - old for new, old in zip(decoded, self._decoded, strict=True))
        found = {
            "active": active,
            "cache": cache,
            "resident": await asyncio.to_thread(resident_bytes),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
            "objects": len(gc.get_objects()),
            "prompt_cache": stats["prompt_cache"]["nbytes"],
            "kv": stats["kv_bytes"],
            "running": stats["running"],
            "batch": stats["batch_size"],
            "waiting": stats["waiting"],
            "rate": (requests - self._requests) / max(now - self._last, 1e-9),
            "decode_rate": tokens / seconds if seconds else 0.0,
        }
        self._last, self._requests, self._decoded = now, requests, decoded
        self.samples.times.append(now - self._start)
        self.samples.stats.append(stats)
        for name, value in found.items():
            self.samples.values[name].append(value)

    async def run_until(self, end: float, interval: float) -> None:
        """Until ``time.monotonic`` says so: while the users go, there is less of everything."""
        while time.monotonic() + interval < end:
            await asyncio.sleep(interval)
            await self.sample()


def _mlx_memory() -> tuple[int, int]:
    return mx.get_active_memory(), mx.get_cache_memory()
