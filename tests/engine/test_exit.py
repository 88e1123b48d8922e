"""How a process ends: with the right code, and never with 134 (SIGABRT from MLX)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_engine import BaseEngine
from tests.conftest import ROOT
from tests.waiting import PATIENCE

START = """
import asyncio, os, sys, threading
from mlx_engine import {engine}
PROMPT = [1, 2, 3]
engine = {engine}({path!r})
async def generate(tokens=20):
    return await engine.generate(PROMPT, max_tokens=tokens, ignore_eos=True)
"""

ENDINGS = {
    "normal": (
        """
async def main():
    async with engine:
        await generate()
asyncio.run(main())
""",
        0,
    ),
    "never stopped": (
        """
async def main():
    await engine.start()
    await generate()
asyncio.run(main())
""",
        0,
    ),
    "exception": (
        """
async def main():
    await engine.start()
    await generate()
    raise LookupError
asyncio.run(main())
""",
        1,
    ),
    "exit code": (
        """
async def main():
    async with engine:
        await generate()
        sys.exit(7)
asyncio.run(main())
""",
        7,
    ),
    "stream never closed": (
        """
async def main():
    await engine.start()
    stream = engine.stream_generate(PROMPT, max_tokens=5000, ignore_eos=True)
    await anext(stream)
    return stream
kept = asyncio.run(main())
""",
        0,
    ),
    "loop abandoned in a daemon thread": (
        """
ready = threading.Event()
async def main():
    await engine.start()
    stream = engine.stream_generate(PROMPT, max_tokens=100000 // 10, ignore_eos=True)
    await anext(stream)
    ready.set()
    await asyncio.sleep(3600)
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
ready.wait()
""",
        0,
    ),
    "interrupted": (
        """
async def main():
    async with engine:
        async with engine.stream_generate(PROMPT, max_tokens=10000, ignore_eos=True) as stream:
            async for _ in stream:
                print("going", flush=True)
asyncio.run(main())
""",
        -signal.SIGINT,
    ),
    "interrupted twice while a function runs": (
        """
import time
async def main():
    await engine.start()
    await generate()
    print("going", flush=True)
    await engine.run_blocking(time.sleep, 0.6)
asyncio.run(main())
""",
        -signal.SIGINT,
    ),
}


def one(script: Path, name: str) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    if name.startswith("interrupted"):
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGINT)
        if "twice" in name:
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("name", ENDINGS)
def test_processes_end_with_the_right_code(
    tiny_path: Path, engine_type: type[BaseEngine], tmp_path: Path, name: str
) -> None:
    body, expected = ENDINGS[name]
    script = tmp_path / "program.py"
    script.write_text(START.format(path=str(tiny_path), engine=engine_type.__name__) + body)
    code, errors = one(script, name)
    assert code == expected, errors
    assert "exception was never retrieved" not in errors
    assert "Task was destroyed" not in errors


def test_streams_are_cleared_by_the_thread_that_had_them(tiny_path: Path, tmp_path: Path) -> None:
    """Without that, mlx 0.32.4 aborts some processes at their exit, but not each time."""
    body = """
import mlx.core as mx
def noted(clear=mx.clear_streams):
    print("cleared by", threading.current_thread().name, flush=True)
    clear()
mx.clear_streams = noted
async def main():
    await engine.start()
    await generate()
asyncio.run(main())
"""
    script = tmp_path / "program.py"
    script.write_text(START.format(path=str(tiny_path), engine="SimpleEngine") + body)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "cleared by mlx\n"), done.stderr


def test_a_forked_child_is_told_instead_of_hanging(
    tiny_path: Path, engine_type: type[BaseEngine], tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        START.format(path=str(tiny_path), engine=engine_type.__name__)
        + """
async def main():
    await engine.start()
    await generate()
asyncio.run(main())
child = os.fork()
if child == 0:
    try:
        asyncio.run(generate())
    except RuntimeError as error:
        print(error, flush=True)
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert "does not survive a fork" in done.stdout
    assert done.stdout.endswith("5\n")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_starts_nothing() -> None:
    code = (
        "import sys, threading, mlx_engine\n"
        "assert threading.active_count() == 1\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')]\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, cwd=ROOT)
