"""``mlx-engine launch``: an agent that is a script, on a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from socket import create_server

import pytest

from mlx_engine.agents import AGENTS
from mlx_engine.cli import launch
from mlx_engine.cli.options import parse
from tests.waiting import PATIENCE

SCRIPT = """\
#!/bin/sh
echo "$ANTHROPIC_MODEL" "$@"
"{python}" -c "import urllib.request as r; print(r.urlopen('$ANTHROPIC_BASE_URL/health').read())"
exit 3
"""
PLACES = {"base": "http://h:1", "model": "a/b", "context": "99", "key": "k", "folder": "/tmp/f"}


@pytest.fixture
def port() -> int:
    """One that nobody listens on."""
    with create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_is_told_where_and_what(name: str) -> None:
    agent = AGENTS[name]
    told = " ".join(
        [
            *agent.environ_for(**PLACES).values(),
            *agent.arguments_for(**PLACES),
            *agent.files_for(**PLACES).values(),
        ]
    )
    assert "http://h:1" in told
    assert "a/b" in told
    assert "$" not in told


def test_what_it_does_not_run_it_shows(
    port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    where = ["launch", "--port", str(port)]
    assert launch.run(parse([*where, "--model", "x", "--print", "claude"])) == 0
    assert launch.run(parse([*where, "pi"])) == 1
    said = capsys.readouterr()
    assert f"export ANTHROPIC_BASE_URL=http://127.0.0.1:{port}\n" in said.out
    assert "export ANTHROPIC_MODEL=x\n" in said.out
    assert "# FOLDER/models.json:" in said.out
    assert "npm install -g @mariozechner/pi-coding-agent" in said.err


def test_it_starts_a_server_and_stops_it(port: int, tiny_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text(SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given = ["--port", str(port), "--model", str(tiny_path), "claude", "--model", "its own"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_engine", "launch", *given],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 3, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{tiny_path.name} --model its own"
    assert json.loads(second[2:-1])["status"] == "ok"
    create_server(("127.0.0.1", port)).close()  # nobody listens any more
