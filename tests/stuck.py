"""A model whose load comes to no end."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


class StuckModel:
    """A copy of a model with a pipe in the place of its tokenizer, which nobody fills.

    Attributes:
        path: of its folder.
    """

    def __init__(self, model: Path, path: Path) -> None:
        self.path = shutil.copytree(model, path)
        self._pipe = path / "tokenizer.json"
        self._tokenizer = self._pipe.read_bytes()
        self._writer: int | None = None
        self._pipe.unlink()
        os.mkfifo(self._pipe)

    @property
    def is_read(self) -> bool:
        """Whether a load has come to the pipe, and is stuck there."""
        if self._writer is None:
            try:
                self._writer = os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nobody reads it
                    raise
                return False
        return True

    def go_on(self) -> None:
        """Fill the pipe, for the load that reads it."""
        assert self.is_read
        assert self._writer is not None
        os.set_blocking(self._writer, True)
        os.write(self._writer, self._tokenizer)
        self.close()

    def repair(self) -> None:
        """From now on it is a model as any other."""
        self.close()
        self._pipe.unlink()
        self._pipe.write_bytes(self._tokenizer)

    def close(self) -> None:
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None
