"""Checks invariant I1 while real MLX runs: one thread inside, and always the same one.

Every entry into MLX that matters is wrapped once for the whole test run: calls of a model and
of an MTP head, ``mx.eval``, ``mx.async_eval`` and ``mx.synchronize``. Each checks that it is on
the MLX thread and that no other thread is inside. Violations raise where they happen, and are kept
for the fixture that looks at the end of each test, in case somebody swallowed the error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama

from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.models.mtp_heads import MTPHead
from mlx_engine.models.split import SplitModel
from tests.waiting import PATIENCE, until, until_now


class TwoInsideMLX(AssertionError):
    """Invariant I1 is broken."""


class Guard:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._installed = False
        self.entries = 0
        self.violations: list[str] = []
        self.hook: Callable[[str], None] | None = None

    def install(self) -> None:
        """Wrap them; once, or each call would count as two."""
        if self._installed:
            return
        self._installed = True
        for name in ("eval", "async_eval", "synchronize"):
            setattr(mx, name, self._guarded(name, getattr(mx, name)))
        entries: list[tuple[Any, str, str]] = [
            (llama.Model, "__call__", "model"),
            (SplitModel, "hidden", "model"),
            (MTPHead, "__call__", "head"),
        ]
        for kind, method, name in entries:
            setattr(kind, method, self._guarded(name, getattr(kind, method)))

    def _guarded(self, name: str, func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(func)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._enter(name)
            try:
                if self.hook is not None:
                    self.hook(name)
                return func(*args, **kwargs)
            finally:
                with self._lock:
                    self._depth -= 1

        return guarded

    def _enter(self, name: str) -> None:
        me = threading.get_ident()
        with self._lock:
            self.entries += 1
            if not mlx_thread.is_current():
                self._fail(f"{name} on thread {threading.current_thread().name!r}")
            if self._depth and self._owner != me:
                self._fail(f"{name} while another thread is inside")
            self._owner = me
            self._depth += 1

    def _fail(self, what: str) -> None:
        self.violations.append(what)
        raise TwoInsideMLX(what)


class Gate:
    """Stops the MLX thread at its nth entry of one kind, until the test lets it go.

    So a test chooses the moment of a cancellation, instead of hoping to hit it.
    """

    def __init__(self, name: str, at: int) -> None:
        self._name = name
        self._at = at
        self._reached = threading.Event()
        self._go = threading.Event()
        self.calls = 0

    def __call__(self, name: str) -> None:
        if name != self._name:
            return
        self.calls += 1
        if self.calls == self._at:
            self._reached.set()
            self._go.wait(PATIENCE)

    async def reached(self) -> None:
        await until(self._reached.is_set, f"{self._name} was not entered {self._at} times")

    def go(self) -> None:
        self._go.set()

    def go_after(self, happened: Callable[[], object]) -> None:
        """Let it go once something has happened, whatever the caller does meanwhile."""

        def wait() -> None:
            try:
                until_now(happened, "the gate stays closed: it has not happened")
            finally:
                self.go()

        threading.Thread(target=wait, name="gate", daemon=True).start()


GUARD = Guard()
