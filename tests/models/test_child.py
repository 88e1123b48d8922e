"""A program that is run ends when whoever wanted it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.processes import is_alive

PROGRAM = """
import os, sys
from pathlib import Path
from mlx_engine.models.child import run_child

folder = Path(sys.argv[1])
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run_child(
    [sys.executable, "-c", code], env=os.environ, stdout=folder / "out", stderr=folder / "err",
    on_tick=lambda: None, should_stop=None,
)
"""


def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    out = tmp_path / "out"
    end = time.monotonic() + 20
    while not (out.exists() and out.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.01)
    pid = int(out.read_text())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < end, "it goes on for nobody"
        time.sleep(0.01)
