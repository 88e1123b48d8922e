"""Running another program to its end, with a way to end it sooner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlx_engine.core.stop import Interrupted

_DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")
_POLL = 0.05  # seconds
_GRACE = 2.0  # seconds between terminate and kill


def run_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    on_tick: Callable[[], None],
    should_stop: Callable[[], bool] | None,
) -> int:
    """Run ``command`` and give its exit code.

    It ends when this process does, however that ends.

    Args:
        stdout, stderr: files for its output; ``on_tick`` may read them as they grow.
        on_tick: called every 0.05 s, and once after the end.
        should_stop: asked as often; once it is true the program is ended.

    Raises:
        OSError: it cannot be started.
        Interrupted: ``should_stop`` was true. The program has ended by then, as it has if
            ``on_tick`` raises.
    """
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_DIE_WITH_PARENT), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=env,
            # Ctrl-C is for us; the child is then ended by us, not by a traceback of its own.
            start_new_session=True,
        )
    try:
        while True:
            if should_stop is not None and should_stop():
                raise Interrupted
            try:
                code = process.wait(timeout=_POLL)
            except subprocess.TimeoutExpired:
                on_tick()
                continue
            on_tick()
            return code
    finally:
        _end(process)


def last_lines(log: Path, count: int = 5) -> str:
    """The end of what a program wrote, without its warnings."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([line for line in lines if not line.startswith("WARNING:")][-count:])


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with process.stdin:  # its end would end the child as well
        if process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
