"""Models from the Hugging Face Hub. No MLX work: runs on any thread."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS
from tqdm.auto import tqdm

from mlx_engine.errors import ModelLoadError
from mlx_engine.outputs import Progress, ProgressCallback
from mlx_engine.turn import Interrupted


def download(
    repo: str,
    revision: str | None,
    on_progress: ProgressCallback | None,
    should_stop: Callable[[], bool] | None,
) -> Path:
    """The folder of a repository's snapshot, fetched unless it is in the Hub's cache.

    Args:
        should_stop: asked whenever a piece of a file has arrived.

    Raises:
        ModelLoadError: no such repository, no access, or no network.
        Interrupted: ``should_stop`` said so; what has arrived is used the next time.
    """
    if should_stop is not None and should_stop():
        raise Interrupted
    watched = _watched_bar(on_progress, should_stop)
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS, tqdm_class=watched
            )
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{repo}: access is restricted; accept its terms on its Hugging Face page, then log "
            "in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{repo}: no such repository on Hugging Face, or it is private; check the name, or "
            "log in with 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"{repo}: has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{repo}: not in the local cache, and the Hugging Face Hub cannot be reached; go "
            "online once, or give the path of a folder"
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"{repo}: the download failed: {error}") from error


def _watched_bar(
    on_progress: ProgressCallback | None, should_stop: Callable[[], bool] | None
) -> type[tqdm[Any]]:
    """A progress bar class that shows nothing, but reports bytes and can end the download."""
    lock = threading.Lock()
    bars: list[tqdm[Any]] = []  # of this download; the Hub counts bytes on two of them

    class WatchedBar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})
            if kwargs.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            if should_stop is not None and should_stop():
                raise Interrupted
            shown: bool | None = super().update(n)
            if on_progress is not None and self in bars:
                with lock:
                    done = max(int(bar.n) for bar in bars)
                    total = max(int(bar.total or 0) for bar in bars)
                on_progress(Progress("download", done, total or None))
            return shown

    return WatchedBar
