"""Run the benchmarks, each in a process of its own, one after the other.

Quick unless told otherwise: some minutes on two quiet cores, to see that everything works, and
numbers that are no result. Those go to OUT/quick; --full runs go to OUT itself, so that a quick
run never takes the place of a full one. With the JSON files and pictures, README.md in the same
folder has the tables of all. The exit code is 1 if a benchmark failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks import NAMES
from benchmarks.page import draw_again, write_page
from benchmarks.setting import RESULTS, ROOT, folder_of


def run(name: str, out: Path, full: bool) -> bool:
    """Run one, and say how it went; what it prints is shown if it failed."""
    print(f"{name:<16}", end="", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out)]
    start = time.perf_counter()
    done = subprocess.run(
        command if full else [*command, "--quick"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    failed = done.returncode != 0
    said = f"failed with exit code {done.returncode} after " if failed else ""
    print(f"{said}{time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        print(done.stdout, flush=True)
    return not failed


def draw_all(out: Path) -> None:
    """The pictures and pages of full and quick results."""
    if find_spec("matplotlib") is None:
        raise SystemExit("pictures need matplotlib: pip install '.[bench]'")
    for folder in (folder_of(out, quick=False), folder_of(out, quick=True)):
        for picture in draw_again(folder):
            print(folder / picture)
        write_page(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="the long runs, about two hours in all")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--plots", action="store_true", help="measure nothing: draw what is in the JSON files again"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="OUT", help="default benchmarks/results"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.plots:
        draw_all(options.out)
        return
    out = options.out.resolve()  # they run elsewhere
    folder = folder_of(out, quick=not options.full)
    names = [name for name in NAMES if options.only is None or name in options.only]
    print(f"{'Full' if options.full else 'Quick'} runs; results go to {folder}", flush=True)
    start = time.perf_counter()
    failed = [name for name in names if not run(name, out, options.full)]
    write_page(folder)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
