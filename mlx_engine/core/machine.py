"""The machine's memory, as far as engines may have it: the one place that asks the system.

On Linux: what is available now, and the limits of the control groups (v1 and v2) that this process
is in. On a Mac without MLX: an estimate of what Metal recommends, which MLX knows exactly once
it is there (``FixedMachine``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_engine.errors import InvalidRequest

Memory = int | float | str
"""The memory that an engine may have: bytes, a part of the machine's, or as much as there is."""

_NO_LIMIT = 2**60  # bytes; control groups (v1) without one have a number beyond it
_SMALL = 32 * 2**30  # bytes of a Mac up to which Metal recommends two thirds of them


class Machine(Protocol):
    """The memory of a machine."""

    @property
    def devoted(self) -> bool:
        """Whether it is for engines to plan with, and not what others happen to leave."""

    def size(self) -> int | None:
        """Bytes that engines could have if nobody else had any; ``None`` if it is not known."""

    def available(self) -> int | None:
        """Bytes that this process could have now, besides those it has; ``None``: not known."""


@dataclass(frozen=True, slots=True)
class FixedMachine:
    """A machine with so many bytes, whatever others do: Metal's, or a test's.

    Attributes:
        nbytes: ``None`` if that is not known.
    """

    nbytes: int | None

    @property
    def devoted(self) -> bool:
        """Nobody else has any."""
        return True

    def size(self) -> int | None:
        """All of them."""
        return self.nbytes

    def available(self) -> int | None:
        """All of them."""
        return self.nbytes


@dataclass(frozen=True, slots=True)
class ToldMachine:
    """Another machine, by what somebody on it has told.

    Attributes:
        whole, left: bytes of ``size`` and ``available``.
        devoted: see ``Machine``.
    """

    whole: int | None = None
    left: int | None = None
    devoted: bool = False

    @classmethod
    def of(cls, machine: Machine) -> ToldMachine:
        """A machine as it is now."""
        return cls(machine.size(), machine.available(), machine.devoted)

    def size(self) -> int | None:
        """As it was told."""
        return self.whole

    def available(self) -> int | None:
        """As it was told."""
        return self.left


@dataclass(frozen=True, slots=True)
class LinuxMachine:
    """A machine with Linux.

    Attributes:
        root: where its files are.
    """

    root: Path = Path("/")

    @property
    def devoted(self) -> bool:
        """Other programs need it as well."""
        return False

    def size(self) -> int | None:
        """The machine's memory, or the smallest limit of a control group."""
        limits = (limit for limit, _ in self._groups())
        return min((self._meminfo().get("MemTotal"), *limits), key=_or_endless, default=None)

    def available(self) -> int | None:
        """Bytes that the kernel can still give, swap included, within the control groups' limits.

        What is in the page cache can be given back, and counts as available.
        """
        told = self._meminfo()
        free = told.get("MemAvailable")
        if free is not None:
            free += told.get("SwapFree", 0)
        rooms = (max(0, limit - used) for limit, used in self._groups())
        return min((free, *rooms), key=_or_endless, default=None)

    def _meminfo(self) -> dict[str, int]:
        """Numbers of /proc/meminfo, in bytes."""
        found: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            for line in (self.root / "proc/meminfo").read_text("ascii").splitlines():
                name, _, rest = line.partition(":")
                if rest.endswith(" kB"):
                    found[name] = int(rest[:-3]) * 1024
        return found

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Limit and use, in bytes, of each control group of this process that has a limit."""
        mount = self.root / "sys/fs/cgroup"
        try:
            lines = (self.root / "proc/self/cgroup").read_text("utf-8").splitlines()
        except (OSError, ValueError):
            return
        for line in lines:
            number, _, rest = line.partition(":")
            controllers, _, name = rest.partition(":")
            if number == "0" and not controllers:
                names = ("memory.max", "memory.current", "inactive_file")
                yield from _up_from(mount, name, names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _up_from(mount / "memory", name, names)


def _up_from(top: Path, name: str, names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    """Limit and use of a control group and of those that it is in.

    Args:
        top: where the hierarchy is mounted; in a container only a part of it may be.
        names: of the files with limit and use, and of the entry in memory.stat with what can be
            given back.
    """
    limit, use, cached = names
    place = top.joinpath(*(part for part in Path(name).parts if part not in ("/", "..")))
    while True:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            most = int((place / limit).read_text("ascii"))
            if most < _NO_LIMIT:
                yield most, int((place / use).read_text("ascii")) - _cached(place, cached)
        if place == top:
            return
        place = place.parent


def _cached(place: Path, name: str) -> int:
    """Bytes of files that are held in memory, and can be read again."""
    with contextlib.suppress(OSError, ValueError):
        for line in (place / "memory.stat").read_text("ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _or_endless(nbytes: int | None) -> int:
    return _NO_LIMIT if nbytes is None else nbytes


@dataclass(frozen=True, slots=True)
class MacMachine:
    """A Mac, in a process that has no MLX: what its GPU may have is a part of its memory.

    Attributes:
        memory: bytes of it.
        wired_limit: megabytes that somebody has set for the GPU (``iogpu.wired_limit_mb``); 0 if
            nobody has.
    """

    memory: int
    wired_limit: int = 0

    @property
    def devoted(self) -> bool:
        """The GPU's is."""
        return True

    def size(self) -> int | None:
        """The limit that is set; else two thirds of a small Mac's memory, or three quarters."""
        if self.wired_limit > 0:
            return min(self.memory, self.wired_limit * 2**20)
        return self.memory * 2 // 3 if self.memory <= _SMALL else self.memory * 3 // 4

    def available(self) -> int | None:
        """The same: others' memory is none of the GPU's."""
        return self.size()


def this_machine() -> Machine:
    """The machine that this process runs on, as far as it is known without MLX."""
    if sys.platform == "darwin":
        memory = sysctl("hw.memsize")
        return FixedMachine(None) if not memory else MacMachine(memory, sysctl(_WIRED_LIMIT) or 0)
    return LinuxMachine()


_WIRED_LIMIT = "iogpu.wired_limit_mb"


def sysctl(name: str) -> int | None:
    """A number that macOS tells under this name; ``None`` if it does not."""
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    try:
        call = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError):
        return None
    failed = call(os.fsencode(name), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else int(value.value)


def memory_limit(memory: Memory, machine: Machine) -> int | None:
    """Bytes that an engine may have by its ``memory``; ``None``: as many as there are.

    Raises:
        InvalidRequest: they are more than the machine has, or a part of what is not known.
    """
    if isinstance(memory, str):
        return None
    size = machine.size()
    if isinstance(memory, float):
        if size is None:
            raise InvalidRequest(
                "memory", "how much this machine has is not known: give bytes instead of a part"
            )
        return max(1, int(size * memory))
    if size is not None and memory > size:
        raise InvalidRequest(
            "memory", f"must be {size} bytes at most, which this machine has, not {memory}"
        )
    return memory
