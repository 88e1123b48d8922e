"""Importing mlx_lm without losing open files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def file_limit_kept() -> Iterator[None]:
    """Inside, the limit of open files may be raised but not lowered.

    mlx_lm (0.32.2) sets it to 2,048, and what it may be raised to again to 4,096, when it is
    imported. That helps a shell on macOS, whose limit is 256; a server that has more is
    left without sockets, and one that may not have 4,096 gets a ``ValueError``.
    """
    original = resource.setrlimit

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE:
            original(which, limits)
            return
        soft, hard = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY and soft < limits[0]:
            wanted = limits[0] if hard == resource.RLIM_INFINITY else min(limits[0], hard)
            original(which, (wanted, hard))

    resource.setrlimit = setrlimit
    try:
        yield
    finally:
        resource.setrlimit = original
