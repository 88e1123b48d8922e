"""Models from the Hugging Face Hub. No MLX work: runs on any thread."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from mlx_engine.errors import ModelLoadError
from mlx_engine.models.child import last_lines, run_child
from mlx_engine.outputs import Progress, ProgressCallback


def download(
    repo: str,
    revision: str | None,
    on_progress: ProgressCallback | None,
    should_stop: Callable[[], bool] | None,
) -> Path:
    """The folder of a repository's snapshot, fetched unless it is in the Hub's cache.

    The Hub's client downloads in pieces of 10 MB and cannot be interrupted inside of one, so
    it runs in a process of its own, which can be ended at any moment.

    Args:
        should_stop: asked every 0.05 s.

    Raises:
        ModelLoadError: no such repository, no access, or no network.
        Interrupted: ``should_stop`` said so; what has arrived is used the next time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reports, log = Path(scratch, "reports"), Path(scratch, "log")
        # As a file, not as a module of the package: that would import mlx_lm for nothing. -P
        # keeps this folder, whose names are common ones, off the child's path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("hub_child.py"))]
        lines, outcome = GrowingLines(reports), dict[str, Any]()

        def on_tick() -> None:
            for report in map(_parsed, lines.new()):
                if "path" in report or "error" in report:
                    outcome.clear()
                    outcome.update(report)
                elif on_progress is not None and "done" in report:
                    on_progress(Progress("download", report["done"], report["total"]))

        try:
            run_child(
                [*command, json.dumps([repo, revision, DEFAULT_ALLOW_PATTERNS])],
                env=os.environ,
                stdout=reports,
                stderr=log,
                on_tick=on_tick,
                should_stop=should_stop,
            )
        except OSError as error:
            raise ModelLoadError(f"{repo}: the download cannot be started: {error}") from error
        if "path" in outcome:
            return Path(outcome["path"])
        raise ModelLoadError(
            outcome.get("error") or f"{repo}: the download failed:\n{last_lines(log)}"
        )


class GrowingLines:
    """The lines of a file that somebody else writes; each is read once.

    Args:
        path: it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0  # bytes that have been read
        self._begun = b""  # of a line that was not complete

    def new(self) -> list[str]:
        """Lines that were completed since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            read = file.read()
        self._place += len(read)
        *complete, self._begun = (self._begun + read).split(b"\n")
        return [line.decode("utf-8", "replace") for line in complete]


def _parsed(line: str) -> dict[str, Any]:
    """A report; nothing of it if somebody else wrote into the child's output."""
    try:
        report = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}
