"""Forks of this process: threads are not in them, and a lock may be held there for ever."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

NO_FORK = "does not survive a fork: start the process with the 'spawn' method instead"


class Forked(Protocol):
    """Something with work to do in a fork of its process."""

    def after_fork(self) -> None:
        """In the child, before anything else runs there."""


def tell_after_fork(one: Forked) -> None:
    """Call ``one.after_fork`` in every fork of this process, as long as it is there."""
    _told.add(one)


def _forked() -> None:
    for one in list(_told):
        one.after_fork()


_told: weakref.WeakSet[Forked] = weakref.WeakSet()

os.register_at_fork(after_in_child=_forked)
