"""The memory of MLX's device, which on a Mac is Metal's."""

from __future__ import annotations

import contextlib

import mlx.core as mx

from mlx_engine.core.ledger import ledger
from mlx_engine.core.machine import FixedMachine

_RECOMMENDED = "max_recommended_working_set_size"


def measure_device() -> None:
    """Tell the ledger what the device may have, where it says so (Metal). On the MLX thread."""
    size = mx.device_info().get(_RECOMMENDED)
    if isinstance(size, int) and size > 0:
        ledger().known(FixedMachine(size))


def clear_cache() -> None:
    """Give back the memory of arrays that are gone. On the MLX thread."""
    with contextlib.suppress(Exception):  # they are gone, and that is what counts
        mx.clear_cache()


class Residency:
    """How much of this process's memory Metal keeps resident: its wired limit.

    Set once, when the first model is there, and lowered again with the last. On the MLX thread.
    Elsewhere than on Metal nothing is done.
    """

    def __init__(self) -> None:
        self._before: int | None = None  # the limit that was there, if ours is set

    def keep(self, nbytes: int | None) -> None:
        """Let so many bytes stay resident; ``None``: as many as the device recommends."""
        recommended = mx.device_info().get(_RECOMMENDED)
        if self._before is not None or not isinstance(recommended, int):
            return
        wanted = recommended if nbytes is None else min(nbytes, recommended)
        with contextlib.suppress(ValueError):  # more than the system allows, which is told at load
            self._before = mx.set_wired_limit(wanted)

    def give_up(self) -> None:
        """Have the limit again that was there before."""
        before, self._before = self._before, None
        if before is not None:
            mx.set_wired_limit(before)


RESIDENCY = Residency()
