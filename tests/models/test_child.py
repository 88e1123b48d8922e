"""A program that is run ends when whoever wanted it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.processes import is_alive
from tests.waiting import until_now

PROGRAM = """
import os, sys
from pathlib import Path
from mlx_engine.models.child import run_child

folder = Path(sys.argv[1])
code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
run_child(
    [sys.executable, "-c", code], env=os.environ, stdout=folder / "out", stderr=folder / "err",
    on_tick=lambda: None, should_stop=None,
)
"""


def test_a_program_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    out = tmp_path / "out"
    until_now(lambda: out.exists() and out.read_text().strip())
    pid = int(out.read_text())
    parent.kill()
    parent.wait()
    until_now(lambda: not is_alive(pid), "it goes on for nobody")
