"""Machines with as much memory as a test wants, in the place of this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_engine.core import ledger as home
from mlx_engine.core.ledger import Ledger
from mlx_engine.core.machine import FixedMachine, Machine
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.models.device import clear_cache


@contextmanager
def machine_of(nbytes: int | None, machine: Machine | None = None) -> Iterator[Ledger]:
    """A ledger for a machine with so many bytes, in the place of the process's."""
    book = Ledger(machine or FixedMachine(nbytes), mlx_thread.is_current, clear_cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "_LEDGER", book)
        yield book
