"""A child process that is started, and waited for, on a thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx_engine
from mlx_engine.core.threads import Start, StartLimit, dead
from mlx_engine.errors import EngineDead

# Blocked when it starts, until it has said what it does with them: by default they would end it.
_NOT_YET = (signal.SIGINT, signal.SIGUSR1)

_living: set[subprocess.Popen[bytes]] = set()


class Child:
    """A new interpreter. A fork and an exec take their time, and nobody but a thread waits.

    Args:
        arguments: for that interpreter.
        passed: file descriptors that it gets, under the same numbers.
        output: the file descriptor of its standard output and error.
        opened: closes, once it has them, what only it needs.
        started: called when it is there, on that thread, as all of these.
        failed: called instead of that, if it cannot be started, from any thread.
        exited: called with its exit code.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        passed: Sequence[int],
        output: int,
        opened: contextlib.ExitStack,
        *,
        started: Callable[[], object],
        failed: Callable[[EngineDead], object],
        exited: Callable[[int], object],
    ) -> None:
        self._arguments = arguments
        self._passed = passed
        self._output = output
        self._opened = opened
        self._started = started
        self._failed = failed
        self._exited = exited
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[signal.Signals] = []
        self._thread = Start(self._live, "mlx-engine wait", self._without_thread)

    @property
    def pid(self) -> int | None:
        """The process's id, once it is there."""
        return None if self._process is None else self._process.pid

    def begin(self) -> None:
        """Have it started, soon.

        Raises:
            EngineDead: it cannot be; ``failed`` is not called then.
        """
        try:
            self._thread.begin()
        except EngineDead:
            self._opened.close()
            raise

    def limit(self) -> StartLimit:
        """Do without it if there is no thread for it after 10 s; see ``Start.limit``."""
        return self._thread.limit()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, now or as soon as it is there. From any thread."""
        with self._lock:
            process = self._process
            if process is None:
                self._early.append(number)
        if process is not None:
            process.send_signal(number)
        elif number is signal.SIGKILL:
            self._thread.give_up()

    def _without_thread(self, error: EngineDead) -> None:
        self._opened.close()
        self._failed(error)

    def _live(self) -> None:
        try:
            process = self._spawn()
        except BaseException as error:  # noqa: BLE001 - the border: whoever wants it raises it
            self._failed(dead("the engine's process could not be started", error))
            return
        finally:
            self._opened.close()
        with self._lock:
            self._process = process
            early = list(self._early)
        for number in early:
            process.send_signal(number)
        self._started()
        code = process.wait()
        _living.discard(process)
        self._exited(code)

    def _spawn(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise OSError("sys.executable does not tell which Python to start")
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_YET)  # of this thread, and so of the child
        process = subprocess.Popen(
            [sys.executable, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=self._passed,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in a terminal is for us
        )
        _living.add(process)
        return process


def _environment() -> dict[str, str]:
    """Our environment, with a way to this package, wherever it was imported from."""
    root = str(Path(mlx_engine.__file__).parents[1])
    environment = dict(os.environ)
    if root not in [*site.getsitepackages(), site.getusersitepackages()]:
        paths = [path for path in (environment.get("PYTHONPATH"), root) if path]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _kill_the_living() -> None:
    """Kill, at exit, the children of engines that nobody stopped."""
    for process in list(_living):
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)


atexit.register(_kill_the_living)
os.register_at_fork(after_in_child=_living.clear)  # they are not the fork's
