"""Downloads from a hub on this machine: progress, cancellation, and what can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from tests.conftest import ROOT
from tests.waiting import PATIENCE

COMMIT = "1" * 40
PIECE = 64 * 1024


class Hub(ThreadingHTTPServer):
    """As much of the Hub's protocol as a snapshot download uses."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.seconds_per_piece = 0.0
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if "/nobody/" in path:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif "/gated/" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in self.server.files.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {}, body)
        elif path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in self.server.files]
            info = {
                "_id": "1",
                "id": "org/model",
                "modelId": "org/model",
                "sha": COMMIT,
                "siblings": names,
            }
            self.reply(200, json.dumps(info).encode(), {}, body)
        elif "/resolve/" in path and (name := path.rsplit("/", 1)[1]) in self.server.files:
            data = self.server.files[name]
            headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
            self.reply(200, data, headers, body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for start in range(0, len(data) if body else 0, PIECE):
                self.wfile.write(data[start : start + PIECE])
                self.server.sent += 1
                time.sleep(self.server.seconds_per_piece)
        except (BrokenPipeError, ConnectionResetError):
            pass


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tiny_path: Path) -> Iterator[Hub]:
    server = Hub(tiny_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(program: str, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a program whose hub is ours; the address is read when the library is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
    )


LOAD = """
import asyncio
from mlx_engine import SimpleEngine, ModelLoadError
seen = []
async def main():
    async with SimpleEngine("org/model", on_progress=seen.append) as engine:
        print(len((await engine.generate([1, 2], max_tokens=3, ignore_eos=True)).tokens))
asyncio.run(main())
downloads = [p for p in seen if p.phase == "download"]
print(bool(downloads), downloads and downloads[-1].done == downloads[-1].total)
"""

REFUSED = """
import asyncio
from mlx_engine import SimpleEngine, ModelLoadError
try:
    asyncio.run(SimpleEngine({model!r}, revision={revision!r}).start())
except ModelLoadError as error:
    print(error)
"""


def test_a_model_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    first = run(LOAD, hub.url, tmp_path)
    assert first.stdout.splitlines() == ["3", "True True"], first.stderr
    hub.shutdown()
    again = run(LOAD, "http://127.0.0.1:1", tmp_path)
    assert again.stdout.splitlines()[0] == "3", again.stderr


def test_what_cannot_be_had_is_said(hub: Hub, tmp_path: Path) -> None:
    missing = run(REFUSED.format(model="nobody/nothing", revision=None), hub.url, tmp_path)
    assert "nobody/nothing: no such repository on Hugging Face" in missing.stdout, missing.stderr
    gated = run(REFUSED.format(model="gated/model", revision=None), hub.url, tmp_path)
    assert "gated/model: access is restricted" in gated.stdout, gated.stderr


def test_without_a_network(tmp_path: Path) -> None:
    offline = run(REFUSED.format(model="org/model", revision=None), "http://127.0.0.1:1", tmp_path)
    assert "cannot be reached; go online once" in offline.stdout, offline.stderr


def test_a_download_can_be_cancelled(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = bytes(600 * PIECE)  # 39 MB, 18 s; told of 10 MB at once
    hub.seconds_per_piece = 0.03
    program = """
import asyncio, time
from mlx_engine import SimpleEngine
async def main():
    started = asyncio.Event()
    engine = SimpleEngine("org/model", on_progress=lambda p: p.done > 300_000 and started.set())
    task = asyncio.create_task(engine.start())
    await started.wait()
    begin = time.monotonic()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        print(engine.state.value, time.monotonic() - begin < 25)
asyncio.run(main())
"""
    done = run(program, hub.url, tmp_path)
    assert done.stdout == "created True\n", done.stderr
    assert hub.sent < 500


def test_what_a_download_reports_is_read_once(tmp_path: Path) -> None:
    """It reports all the time, and is looked at twenty times a second, for hours."""
    from mlx_engine.models.hub import GrowingLines

    path = tmp_path / "reports"
    path.touch()
    lines, seen, read = GrowingLines(path), list[str](), 0
    said = [json.dumps({"done": number, "total": "é"}, ensure_ascii=False) for number in range(500)]
    text = "".join(f"{line}\n" for line in said).encode()
    for start in range(0, len(text), 7):  # within lines and within characters
        with path.open("ab") as file:
            file.write(text[start : start + 7])
        seen += lines.new()
        read = max(read, len(lines._begun))
    assert seen == said
    assert lines.new() == []
    assert read < 60, "no more than a line is kept"


def test_a_look_at_a_long_download_costs_what_is_new(tmp_path: Path) -> None:
    from mlx_engine.models.hub import GrowingLines

    path = tmp_path / "reports"
    path.write_bytes(b'{"done": 1}\n' * 1_000_000)
    lines = GrowingLines(path)
    assert len(lines.new()) == 1_000_000
    began = time.thread_time()
    for _ in range(200):
        with path.open("ab") as file:
            file.write(b'{"done": 2}\n')
        assert lines.new() == ['{"done": 2}']
    assert time.thread_time() - began < 0.5
