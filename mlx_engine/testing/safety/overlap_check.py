"""A check that no two are inside MLX at once, as far as an engine's callers can see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_engine.testing.safety.fault import Fault


class OverlapCheck:
    """A check of who is inside MLX, by functions that the engine calls there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: str | None = None
        self._thread: int | None = None
        self._complaints: list[str] = []

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """On the engine's thread: somebody is inside."""
        thread = threading.get_ident()
        with self._lock:
            if self._inside is not None:
                self._complain(f"two were inside MLX at once: {self._inside} and {name}")
            if self._thread not in (None, thread):
                self._complain("work has been inside MLX on two threads")
            self._inside, self._thread = name, thread
        try:
            yield
        finally:
            with self._lock:
                self._inside = None

    @contextmanager
    def until_told(self, name: str) -> Iterator[Callable[[], bool]]:
        """Around the call of an engine whose work makes visits: it is over when the block is.

        Gives what tells, inside, whether its caller has been told of its end.
        """
        told = False
        try:
            yield lambda: told
            told = True
        except BaseException as error:
            told = not isinstance(error, GeneratorExit)  # that is said when nobody is left
            raise
        finally:
            if told and self._inside == name:
                self.complain(f"its caller was told while {name} was inside MLX")

    def complain(self, what: str) -> None:
        """Note a fault."""
        with self._lock:
            self._complain(what)

    def _complain(self, what: str) -> None:
        if what not in self._complaints:
            self._complaints.append(what)

    def check(self) -> None:
        """Raise ``Fault`` if anything was noted since the last time."""
        with self._lock:
            complaints, self._complaints = self._complaints, []
        if complaints:
            raise Fault("; ".join(complaints))

    def forget(self) -> None:
        """Another engine comes, which may have another thread."""
        with self._lock:
            self._thread, self._complaints = None, []
