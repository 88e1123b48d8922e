"""Stopping work that is under way: it looks between its steps whether it should."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """Work on the MLX thread saw that it should stop, and did."""


_should_stop: contextvars.ContextVar[Callable[[], bool] | None] = contextvars.ContextVar(
    "_should_stop", default=None
)


@contextmanager
def stoppable(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Work in this block ends at its next ``checkpoint`` once ``should_stop()``."""
    token = _should_stop.set(should_stop)
    try:
        yield
    finally:
        _should_stop.reset(token)


def checkpoint() -> None:
    """Between two steps of work that takes some: raises ``Interrupted`` if it should stop.

    For what lies deep inside the start of an engine, such as trials of a model. It never stops
    what is in no ``stoppable`` block.
    """
    should_stop = _should_stop.get()
    if should_stop is not None and should_stop():
        raise Interrupted
