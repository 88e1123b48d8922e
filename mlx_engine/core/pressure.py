"""Pressure: the system is short of memory, whoever has it, and engines give up what they can.

    source, asked once a second ─► stage, a step up or down ─► ledger.relieve, on the MLX thread

No request is ever aborted because of it.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Literal, Protocol, get_args

from mlx_engine.core.forks import tell_after_fork
from mlx_engine.core.ledger import Ledger, ledger
from mlx_engine.core.log import LOG
from mlx_engine.core.machine import LinuxMachine, sysctl
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.threads import Start
from mlx_engine.errors import EngineDead
from mlx_engine.memory_stats import PressureStage

Level = Literal["normal", "warning", "critical"]

_STAGES: tuple[PressureStage, ...] = get_args(PressureStage)
_HIGHEST: dict[Level, PressureStage] = {"normal": "none", "warning": "clear", "critical": "stop"}
_INTERVAL = 1.0  # seconds between two looks
_SOME, _FULL = 20.0, 10.0  # percent of ten seconds in which some, or all, waited for memory
_LITTLE, _LEAST = 0.05, 0.02  # parts of the memory that are available still
_MAC_LEVEL = "kern.memorystatus_vm_pressure_level"
_MAC_LEVELS: dict[int, Level] = {1: "normal", 2: "warning", 4: "critical"}


class PressureSource(Protocol):
    """Somebody who knows how short of memory the system is."""

    def level(self) -> Level:
        """How short it is now. On any thread; cheap."""


class MacPressure:
    """macOS's own judgement, which it tells applications by the same three levels."""

    def level(self) -> Level:
        """The level of the system; ``normal`` where it does not tell."""
        return _MAC_LEVELS.get(sysctl(_MAC_LEVEL) or 1, "normal")


class LinuxPressure:
    """Linux: for how long processes had to wait for memory, and how much is available.

    The first is told of the control group that this process is in where it is mounted (as in a
    container), or of the machine (PSI); not every kernel tells it.

    Args:
        root: where the system's files are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._machine = LinuxMachine(root)
        self._files = (root / "sys/fs/cgroup/memory.pressure", root / "proc/pressure/memory")

    def level(self) -> Level:
        """The worse one of both."""
        some, full = self._waits()
        left = self._left()
        if full >= _FULL or left < _LEAST:
            return "critical"
        return "warning" if some >= _SOME or left < _LITTLE else "normal"

    def _waits(self) -> tuple[float, float]:
        """Percent of the last ten seconds in which some, and all, processes waited for memory."""
        for file in self._files:
            try:
                lines = file.read_text("ascii").splitlines()
                told = {line.split()[0]: float(line.split()[1][6:]) for line in lines}
                return told["some"], told["full"]
            except (OSError, ValueError, KeyError, IndexError):
                continue
        return 0.0, 0.0

    def _left(self) -> float:
        """The part of the memory that is available, swap included."""
        size, available = self._machine.size(), self._machine.available()
        return 1.0 if not size or available is None else available / size


def system_pressure() -> PressureSource:
    """The source of the system that this process runs on."""
    return MacPressure() if sys.platform == "darwin" else LinuxPressure()


def next_stage(stage: PressureStage, level: Level) -> PressureStage:
    """The stage that follows at this level: one up, one down, or the same. A pure function."""
    now, most = _STAGES.index(stage), _STAGES.index(_HIGHEST[level])
    return _STAGES[now + (now < most) - (now > most)]


class PressureWatch:
    """Looks at a source as long as there is an engine, and has the ledger do what follows.

    Args:
        source: of the system's pressure.
        interval: seconds between two looks.
    """

    def __init__(self, source: PressureSource, interval: float = _INTERVAL) -> None:
        self.source = source
        self._interval = interval
        self._lock = threading.Lock()
        self._watching = False
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In a fork of this process: the thread is not there."""
        self._lock, self._watching = threading.Lock(), False

    def begin(self) -> None:
        """Look from now on, until the ledger has no account any more. From any thread."""
        with self._lock:
            if self._watching:
                return
            self._watching = True
        try:
            Start(self._watch, "mlx-engine pressure", self._not_started).begin()
        except EngineDead as error:
            self._not_started(error)

    def look(self) -> None:
        """Look once, and have done what follows. From any thread."""
        book, level = ledger(), self.source.level()
        before, stage = book.stage, next_stage(book.stage, level)
        book.stage = stage
        if stage != before:
            LOG.info("memory pressure: %s, after %s", stage, before)
        if level != "normal":
            book.relief_due = True
            mlx_thread.post(book.relieve)

    def _watch(self) -> None:
        while True:
            time.sleep(self._interval)
            with self._lock:
                if not ledger().accounts:
                    ledger().stage = "none"
                    self._watching = False
                    return
            self.look()

    def _not_started(self, error: EngineDead) -> None:
        LOG.warning("memory pressure is not watched: %s", error)
        with self._lock:
            self._watching = False


def watch_pressure() -> None:
    """Watch the system's pressure as long as there is an engine in this process."""
    WATCH.begin()


def admits(book: Ledger, running: int) -> bool:
    """Whether a batch with so many requests may take up another: one is always served."""
    return not running or book.stage != "stop"


WATCH = PressureWatch(system_pressure())
