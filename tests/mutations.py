"""Breaks the library in known ways, one at a time, and sees that the tests notice each.

    python -m tests.mutations [--only WORDS]

Each mutation is made in a copy, on which the tests of cancellation are run until one fails.
Exit code 1 if none does, or if a mutation does not fit the code any more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_worker.py",
    "tests/test_stream.py",
    "tests/engine/test_preparation.py",
    "tests/engine/test_cancellation.py",
)
SWEEP = (
    "simple and not draft and not mtp and not specprefill and not batch"
    " and (generate or stream or run)"
)
LIMIT = 300  # seconds for the tests of one mutation


@dataclass(frozen=True)
class Mutation:
    """A fault, and how to make it: ``old`` is in the file once.

    Attributes:
        tests: those that should notice; the sweep comes after them.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS


MUTATIONS = (
    Mutation(
        "a cancelled caller goes on, and the lock is released, while the worker is inside",
        "core/work_queue.py",
        "            withdrawn = queued and not one.preparing\n",
        "            withdrawn = True\n            self._running = None\n",
    ),
    Mutation(
        "a plain await in the drain: the second cancellation ends it",
        "core/drain.py",
        """            try:
                await asyncio.wait({future})
            except asyncio.CancelledError:
                continue
""",
        "            await asyncio.wait({future})\n",
    ),
    Mutation(
        "no shield around the drain: an anyio scope cancels it at every turn of the loop",
        "core/drain.py",
        "with anyio.CancelScope(shield=True) if by_anyio",
        "with anyio.CancelScope(shield=False) if by_anyio",
    ),
    Mutation(
        "streams are not cleared when the MLX thread ends",
        "engine/mlx_work.py",
        "    mx.clear_streams()\n",
        "",
        ("tests/engine/test_exit.py",),
    ),
    Mutation(
        "CancelledError is swallowed",
        "core/drain.py",
        "            await _stay(future)\n        raise\n",
        "            await _stay(future)\n",
    ),
    Mutation(
        "the lock is released twice: when the work is cancelled, and when it is over",
        "core/work_queue.py",
        "            on_cancel = one.take_on_cancel()\n",
        "            on_cancel = one.take_on_cancel()\n            self._running = None\n",
    ),
    Mutation(
        "work is not told that it was cancelled",
        "core/work_queue.py",
        "            on_cancel = one.take_on_cancel()\n",
        "            on_cancel = None\n",
    ),
    Mutation(
        "what was withdrawn is done nevertheless",
        "core/mlx_thread.py",
        "        super()._withdraw(one)\n        self._leave_lane(one)\n",
        "        super()._withdraw(one)\n",
    ),
    Mutation(
        "the last one in is served first",
        "core/mlx_thread.py",
        "heads = (next(iter(lane))",
        "heads = (next(reversed(lane))",
    ),
    Mutation(
        "whoever is prepared first is served first",
        "core/mlx_thread.py",
        "heads = (next(iter(lane)) for lane in self._lanes.values())",
        "heads = iter(self._queue)",
    ),
    Mutation(
        "a caller is told that it is cancelled while its prompt is still being prepared",
        "core/work_queue.py",
        "            withdrawn = queued and not one.preparing\n",
        "            withdrawn = queued\n",
    ),
    Mutation(
        "the lock is free before the function has returned",
        "core/mlx_thread.py",
        "                job.execute()\n",
        "                self._running = None\n                job.execute()\n",
    ),
    Mutation(
        "a cancelled reader of a stream does not wait until the work is out",
        "core/stream.py",
        "            await clean_up(cancelled, self.aclose)\n",
        "            self.cancel()\n",
    ),
    Mutation(
        "work of an event loop that is gone is done",
        "core/mlx_thread.py",
        "if job.orphaned:",
        "if False:",
    ),
    Mutation(
        "a cancelled save waits for the turn that it has asked for",
        "core/turns.py",
        "            mlx_thread.abort(turn, Interrupted())\n",
        "            pass\n",
        tests=("tests/engine/test_cache_files.py",),
    ),
    Mutation(
        "a save is over for its caller while its thread is at work",
        "core/sliced_job.py",
        "        return self._begun\n",
        "        return False\n",
        tests=("tests/engine/test_cache_files.py",),
    ),
    Mutation(
        "a save that was stopped leaves its temporary file",
        "models/whole_file.py",
        "    finally:\n        temporary.unlink(missing_ok=True)\n",
        "    finally:\n        pass\n",
        tests=("tests/engine/test_cache_files.py",),
    ),
    Mutation(
        "a start that was cancelled goes on with its trials of the model",
        "core/stop.py",
        "if should_stop is not None and should_stop():",
        "if False:",
    ),
    Mutation(
        "a function that raises no Exception ends the MLX thread",
        "core/work.py",
        "except BaseException as error:  # noqa: BLE001 - the border: the caller raises it",
        "except Exception as error:  # noqa: BLE001 - the border: the caller raises it",
    ),
    Mutation(
        "who blocks without await leaves at Ctrl-C, while the work is inside",
        "core/loop_thread.py",
        "        while not self._over:\n",
        "        while not (self._over or self._interrupt):\n",
        tests=("tests/engine/test_sync.py", "tests/engine/test_sync_signals.py"),
    ),
    Mutation(
        "a mistake of a script is an error that applications retry",
        "testing/scripted_request.py",
        "        if not isinstance(error, ScriptError):\n            return self.failed(error)\n",
        "        return self.failed(error)\n",
        tests=("tests/testing/test_fake_scripts.py",),
    ),
)


def noticed(mutation: Mutation, folder: Path) -> str | None:
    """The test that fails on a copy with the mutation; ``None`` if there is none."""
    for name in ("mlx_engine", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    path = folder / "mlx_engine" / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file} has changed: the mutation {mutation.what!r} does not fit"
        )
    path.write_text(source.replace(mutation.old, mutation.new))
    for arguments in ((*mutation.tests,), ("tests/sweep", "-k", SWEEP)):
        failure = first_failure(folder, *arguments)
        if failure is not None:
            return failure
    return None


def first_failure(folder: Path, *arguments: str) -> str | None:
    """What fails first; ``None`` if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "20", "-rfE", *arguments]
    there = {**os.environ, "PYTHONPATH": str(folder)}  # for the programs that tests start
    try:
        done = subprocess.run(
            command, cwd=folder, env=there, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT} s"
    if done.returncode == 0:
        return None
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.partition(" ")[2].partition(" - ")[0]
    return f"pytest ended with {done.returncode}"


def main() -> None:
    """Try them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those with these words in their description")
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.what]
    missed = 0
    for mutation in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            test = noticed(mutation, Path(folder))
        seconds = time.monotonic() - began
        missed += test is None
        print(f"{mutation.what}\n    {'NOT NOTICED' if test is None else test} ({seconds:.0f} s)")
    print(f"{len(chosen) - missed} of {len(chosen)} mutations are noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
