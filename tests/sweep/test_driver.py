"""The driver of the sweep's threads: what a failure of it would say of the product."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest

from tests.sweep.driver import Driver, _Driven
from tests.waiting import PATIENCE


class _Work:
    """Something that a thread runs, and that can be watched."""

    def __call__(self) -> None:
        pass


def test_nothing_is_kept_by_a_thread_that_is_over_and_has_not_gone_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end, may_go = _Driven.end, threading.Event()

    def end_slowly(driven: _Driven) -> None:
        end(driven)
        may_go.wait(PATIENCE)

    monkeypatch.setattr(_Driven, "end", end_slowly)
    driver, work = Driver(), _Work()
    kept: Callable[[], object] = weakref.ref(work)
    driver.start(work, "work")
    del work
    try:
        driver.settle()
        assert kept() is None
    finally:
        may_go.set()
        driver.close()
