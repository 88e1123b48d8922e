"""Processes that stand still while they import something, until they are let go."""

from __future__ import annotations

import os
from pathlib import Path

# What stands in for a module: it waits for somebody to open a pipe, and becomes the real one.
_STAND_IN = """
import sys
sys.path.remove({folder!r})
open({pipe!r}).read()
del sys.modules[__name__]
__import__(__name__)
"""


class HeldImport:
    """A folder for ``PYTHONPATH``, with which the import of ``module`` waits."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder
        self._pipe = folder / "pipe"
        self._writer: int | None = None
        os.mkfifo(self._pipe)
        stand_in = _STAND_IN.format(folder=str(folder), pipe=str(self._pipe))
        (folder / f"{module}.py").write_text(stand_in)

    @property
    def path(self) -> str:
        """``PYTHONPATH``, as it is to be."""
        return os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))

    def reach(self) -> None:
        """Wait until a process is importing it. Blocks."""
        self._writer = os.open(self._pipe, os.O_WRONLY)

    def go(self) -> None:
        """Let the process go on."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None
