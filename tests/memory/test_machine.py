"""How much memory there is, by the files of systems that are not this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_engine import InvalidRequest
from mlx_engine.core.machine import (
    FixedMachine,
    LinuxMachine,
    MacMachine,
    memory_limit,
    sysctl,
    this_machine,
)

GIB = 2**30
MEMINFO = """MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
SwapTotal:       2097152 kB
SwapFree:        1048576 kB
HugePages_Total:       0
"""


def system(root: Path, **files: str) -> LinuxMachine:
    """A machine with these files; ``__`` in a name is a slash."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return LinuxMachine(root)


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    machine = system(tmp_path)
    assert machine.size() == 16 * GIB
    assert machine.available() == 9 * GIB, "what the kernel can give, swap included"


def test_nothing_is_known_without_files(tmp_path: Path) -> None:
    machine = LinuxMachine(tmp_path)
    assert machine.size() is None
    assert machine.available() is None


V2 = {"proc__self__cgroup": "0::/user.slice/app.scope\n"}


def group(path: str, limit: str, use: int, cached: int = 0) -> dict[str, str]:
    place = "__".join(["sys", "fs", "cgroup", *filter(None, path.split("/"))])
    return {
        f"{place}__memory.max": limit,
        f"{place}__memory.current": f"{use}\n",
        f"{place}__memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 7\n",
    }


def test_the_smallest_limit_of_the_groups_counts(tmp_path: Path) -> None:
    files = group("user.slice/app.scope", f"{4 * GIB}\n", 3 * GIB, GIB)
    files |= group("user.slice", f"{6 * GIB}\n", 5 * GIB)
    machine = system(tmp_path, **V2, **files)
    assert machine.size() == 4 * GIB
    assert machine.available() == 1 * GIB, "of the outer group"


def test_a_group_without_a_limit_does_not_count(tmp_path: Path) -> None:
    machine = system(tmp_path, **V2, **group("user.slice/app.scope", "max\n", 3 * GIB))
    assert machine.size() == 16 * GIB
    assert machine.available() == 9 * GIB


def test_what_files_take_in_memory_can_be_given_back(tmp_path: Path) -> None:
    files = group("user.slice/app.scope", f"{4 * GIB}\n", 4 * GIB, 3 * GIB)
    assert system(tmp_path, **V2, **files).available() == 3 * GIB


def test_in_a_container_the_group_is_the_top(tmp_path: Path) -> None:
    files = group("", f"{2 * GIB}\n", GIB)
    machine = system(tmp_path, proc__self__cgroup="0::/\n", **files)
    assert (machine.size(), machine.available()) == (2 * GIB, GIB)


def test_a_group_of_which_only_the_outer_part_is_mounted(tmp_path: Path) -> None:
    files = group("", f"{2 * GIB}\n", GIB)
    machine = system(tmp_path, proc__self__cgroup="0::/../../docker/abc\n", **files)
    assert (machine.size(), machine.available()) == (2 * GIB, GIB)


@pytest.mark.parametrize("place", ["docker__abc__", ""])
def test_version_one(tmp_path: Path, place: str) -> None:
    base = f"sys__fs__cgroup__memory__{place}memory"
    files = {
        "proc__self__cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        f"{base}.limit_in_bytes": f"{3 * GIB}\n",
        f"{base}.usage_in_bytes": f"{2 * GIB}\n",
        f"{base}.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    machine = system(tmp_path, **files)
    assert (machine.size(), machine.available()) == (3 * GIB, 2 * GIB)


def test_version_one_without_a_limit(tmp_path: Path) -> None:
    files = {
        "proc__self__cgroup": "4:memory:/\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
        "sys__fs__cgroup__memory__memory.usage_in_bytes": "5\n",
    }
    assert system(tmp_path, **files).available() == 9 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = group("user.slice/app.scope", f"{GIB}\n", 2 * GIB)
    assert system(tmp_path, **V2, **files).available() == 0


@pytest.mark.parametrize(
    ("memory", "wired", "expected"),
    [(16, 0, 16 * 2 / 3), (32, 0, 32 * 2 / 3), (36, 0, 27), (64, 0, 48), (64, 57344, 56)],
)
def test_a_mac_without_mlx(memory: int, wired: int, expected: float) -> None:
    machine = MacMachine(memory * GIB, wired)
    assert machine.size() == machine.available() == int(expected * GIB)


@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's files")
def test_this_machine() -> None:
    machine = this_machine()
    size, available = machine.size(), machine.available()
    assert size is not None
    assert available is not None
    assert size > 2**26
    assert available > 0


@pytest.mark.skipif(sys.platform != "darwin", reason="only macOS has it")
def test_this_mac() -> None:
    memory = sysctl("hw.memsize")
    assert memory is not None
    assert memory > GIB
    assert sysctl("kern.memorystatus_vm_pressure_level") in (1, 2, 4)
    assert sysctl("no.such.name") is None


def test_memory_is_bytes_or_a_part_or_as_much_as_there_is() -> None:
    machine = FixedMachine(1000)
    assert memory_limit("auto", machine) is None
    assert memory_limit(0.5, machine) == 500
    assert memory_limit(1000, machine) == 1000
    with pytest.raises(InvalidRequest, match=r"^memory: must be 1000 bytes at most, .* 1001$"):
        memory_limit(1001, machine)
    with pytest.raises(InvalidRequest, match=r"^memory: .*not known: give bytes"):
        memory_limit(0.5, FixedMachine(None))
    assert memory_limit(10**15, FixedMachine(None)) == 10**15
