"""Looking at processes."""

from __future__ import annotations

import os
import subprocess


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_stopped(pid: int) -> bool:
    """Whether it was stopped by a signal."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True).stdout.startswith("T")


def children() -> list[str]:
    """The processes of engines that this one has started: id, parent, state, command."""
    command = ["ps", "-ww", "-A", "-o", "pid=,ppid=,stat=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        line
        for line in listed.splitlines()
        if "mlx_engine.remote.serving.child" in line and int(line.split()[1]) == os.getpid()
    ]
