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
        seen: list[dict[str, Any]] = []

        def on_tick() -> None:
            written = reports.read_text("utf-8").split("\n")[:-1]  # the last is not complete
            for line in written[len(seen) :]:
                seen.append(_parsed(line))
                if on_progress is not None and "done" in seen[-1]:
                    on_progress(Progress("download", seen[-1]["done"], seen[-1]["total"]))

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
        outcome: dict[str, Any] = next(
            (r for r in reversed(seen) if "path" in r or "error" in r), {}
        )
        if "path" in outcome:
            return Path(outcome["path"])
        raise ModelLoadError(
            outcome.get("error") or f"{repo}: the download failed:\n{last_lines(log)}"
        )


def _parsed(line: str) -> dict[str, Any]:
    """A report; nothing of it if somebody else wrote into the child's output."""
    try:
        report = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}
