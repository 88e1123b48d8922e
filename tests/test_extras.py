"""What is said where an extra is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_engine.extras import installing
from tests.waiting import PATIENCE


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (None, "pip install 'mlx-engine[server]'"),
        ({"dir_info": {"editable": True}}, "pip install -e '{}[server]'"),
        ({"dir_info": {}}, "pip install '{}[server]'"),
        (
            {"url": "https://there.invalid/x", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'mlx-engine[server] @ git+https://there.invalid/x'",
        ),
        ({"url": "file:///there/is/none", "dir_info": {}}, "pip install 'mlx-engine[server]'"),
    ],
    ids=["index", "editable", "clone", "git", "gone"],
)
def test_an_extra_comes_from_where_the_package_came_from(
    origin: dict[str, object] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    info = tmp_path / "mlx_engine-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-engine\nVersion: 0.1.0\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps({"url": clone.as_uri(), **origin}))
    monkeypatch.syspath_prepend(tmp_path)
    assert installing("server") == said.format(clone)


# Without the packages of the extra, or what is left of them.
WITHOUT = "import sys; sys.modules[{!r}] = None; "


@pytest.mark.parametrize("package", ["starlette", "prometheus_client"])
def test_the_server_says_what_it_needs(package: str) -> None:
    done = python(WITHOUT.format(package) + "import mlx_engine.server")
    last = done.stderr.splitlines()[-1]
    said = f"ModuleNotFoundError: mlx_engine.server needs {package}"
    assert last.startswith(said), done.stderr
    assert last.endswith("[server]'"), last
    assert ": pip install " in last


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_serve_says_what_it_needs(package: str) -> None:
    code = "from mlx_engine.cli import main; sys.exit(main(['serve']))"
    done = python(WITHOUT.format(package) + code)
    assert done.returncode == 2
    assert done.stderr.startswith(f"mlx-engine: error: serve: needs {package}")
    assert done.stderr.endswith("[server]'\n")
    assert done.stderr.count("\n") == 1


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
