"""A signal while there is nothing to stop yet: it ends the process, with its code."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130


def leave_at_once(signum: int = 0, frame: FrameType | None = None) -> NoReturn:
    """End the process, without the interpreter's own exit, which may wait."""
    os._exit(0 if signum == signal.SIGTERM else EXIT_INTERRUPTED)


def install(argv: Sequence[str]) -> None:
    """From now on Ctrl-C ends the process at once, wherever nothing else is said.

    For what serves so does SIGTERM, which is no failure of it, and Ctrl-C also where a shell has
    started it in the background, with that ignored. Elsewhere that stays ignored.
    """
    serves = argv[:1] in (["host"], ["serve"])
    if serves or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave_at_once)
    if serves and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, leave_at_once)
