"""The program that downloads from the Hugging Face Hub, for ``hub.download``.

Its argument is a JSON list of repository, revision and file patterns. It prints JSON
objects, one a line: ``{"done": bytes, "total": bytes}`` on the way, and at last either
``{"path": folder}`` or ``{"error": what to tell the user}``.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from typing import Any

from huggingface_hub import errors, snapshot_download
from tqdm.auto import tqdm


def main() -> None:
    """Download, and print reports."""
    repo, revision, patterns = json.loads(sys.argv[1])
    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, tqdm_class=ReportingBar
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        report(error=f"{repo}: {explain(error, revision)}")
    else:
        report(path=path)


def explain(error: Exception, revision: str | None) -> str:
    """Words for what went wrong, and what to do."""
    if isinstance(error, errors.GatedRepoError):
        return (
            "access is restricted; accept its terms on its Hugging Face page, then log in with "
            "'hf auth login'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such repository on Hugging Face, or it is private; check the name, or log in "
            "with 'hf auth login'"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "not in the local cache, and the Hugging Face Hub cannot be reached; go online "
            "once, or give the path of a folder"
        )
    return f"the download failed: {error}"


def report(**values: Any) -> None:
    """Print one report."""
    print(json.dumps(values), flush=True)  # noqa: T201 - this is its protocol


class ReportingBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that is not shown; its numbers are reported."""

    _lock_of_all = threading.Lock()
    _bars: list[ReportingBar] = []  # noqa: RUF012 - the Hub counts bytes on two of them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "file": io.StringIO()})
        if kwargs.get("unit") == "B":
            self._bars.append(self)

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more, and report."""
        shown: bool | None = super().update(n)
        if self in self._bars:
            with self._lock_of_all:
                done = max(int(bar.n) for bar in self._bars)
                total = max(int(bar.total or 0) for bar in self._bars)
                report(done=done, total=total or None)
        return shown


if __name__ == "__main__":
    main()
