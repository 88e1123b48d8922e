"""``mlx-engine selftest``."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_engine.cli import selftest
from mlx_engine.cli.options import parse
from mlx_engine.testing import FakeEngine
from tests.test_cli import finish, started
from tests.waiting import PATIENCE


def test_a_safe_engine_gets_a_report(tiny_path: Path) -> None:
    code, out, said = finish("selftest", str(tiny_path), "--seconds", "1", "--only", "generate")
    assert code == 0
    assert out.startswith("SimpleEngine: cancelled ")
    assert re.search(r"at \d+ of \d+ moments, no failure; \d+ s, seed 0\n", out)
    assert re.search(r"^\| generate \|.* \| 0 \|$", out, re.MULTILINE)
    assert re.fullmatch(r"mlx-engine: generate: \d+ steps [^\n]*\n", said)


def test_a_broken_one_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Swallows(FakeEngine):
        def __init__(self, **_: Any) -> None:
            super().__init__(seconds_per_token=0.001)

        async def generate(self, *args: Any, **options: Any) -> Any:
            task = asyncio.ensure_future(super().generate(*args, **options))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                return await task

    monkeypatch.setitem(selftest._KINDS, "batched", Swallows)
    line = ["selftest", "m", "--engine", "batched", "--only", "generate", "--seed", "5"]
    assert selftest.run(parse([*line, "--seconds", "3"])) == 1
    shown = capsys.readouterr()
    assert re.search(r'^Again, with chances: only="generate / [^"]+", seed=5$', shown.out, re.M)
    assert "the outcome is not honest" in shown.err


def test_errors_are_those_of_every_command(tmp_path: Path) -> None:
    code, out, said = finish("selftest", str(tmp_path / "none"))
    assert (code, out) == (1, "")
    assert re.fullmatch(r"mlx-engine: error: [^\n]*none[^\n]*\n", said)
    code, out, said = finish("selftest", str(tmp_path), "--seconds", "-1")
    assert (code, out) == (2, "")
    assert said.startswith("mlx-engine: error: argument --seconds: must be")
    code, out, said = finish("selftest", str(tmp_path), "--only", "generate / politely")
    assert (code, out) == (2, "")
    assert said.startswith("mlx-engine: error: argument --only: there is no way")


def test_ctrl_c_ends_it(tiny_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with started("selftest", str(tiny_path), "--seconds", "300") as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"mlx-engine: ")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 130
    assert out == b""
