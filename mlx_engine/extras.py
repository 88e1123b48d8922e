"""Extras: packages that only a part of this one needs, and how they are installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_PACKAGE = "mlx-engine"


def installing(extra: str) -> str:
    """The command that installs an extra, from where the package itself has come from."""
    wanted = f"{_PACKAGE}[{extra}]"
    try:
        origin = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        origin = {}
    url = origin.get("url", "")
    folder = Path(url2pathname(urlsplit(url).path))
    if "vcs_info" in origin:
        wanted = f"{wanted} @ {origin['vcs_info']['vcs']}+{url}"
    elif url.startswith("file:") and folder.exists():  # a clone, most often
        editable = origin.get("dir_info", {}).get("editable")
        return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install '{wanted}'"
