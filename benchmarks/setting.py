"""What every benchmark needs before it can measure: arguments, and a model folder."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.spread import Record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK = "quick"  # the folder in that of the results where those of quick runs go


@dataclass(frozen=True, slots=True)
class Setting:
    """How to run a benchmark.

    Attributes:
        name: of the benchmark, and of its files.
        quick: a run of seconds, to see that it works; its numbers are no result.
        repeats: rounds of each measurement.
        out: folder for JSON and picture; that of quick runs is another one.
        model: folder or name of a model; ``None`` is a random one.
        layers: of the random one.
        own: all arguments, with those that only this benchmark has.
        machine: as it was before the benchmark began.
        started: by ``time.perf_counter``.
    """

    name: str
    quick: bool
    repeats: int
    out: Path
    model: str | None
    layers: int
    own: argparse.Namespace
    machine: Record
    started: float

    @property
    def mode(self) -> str:
        """As it is written down."""
        return "quick" if self.quick else "full"

    @property
    def date(self) -> str:
        """Of today."""
        return datetime.date.today().isoformat()


def folder_of(out: Path, quick: bool) -> Path:
    """Where results go: those of quick runs never take the place of others."""
    return out / QUICK if quick else out


def parse_setting(
    name: str,
    description: str | None,
    *,
    repeats: int | None,
    quick_repeats: int = 3,
    layers: int | None = 2,
    add_own: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Setting:
    """The command line of a benchmark.

    Args:
        name: of the benchmark.
        description: printed by ``--help``.
        repeats: the default; ``None`` for a benchmark of one round, without the option.
        quick_repeats: the default with ``--quick``.
        layers: of the random model, by default; ``None`` for a benchmark with models of its own,
            without the options.
        add_own: adds the benchmark's own options.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a run that is no result; written to OUT/quick"
    )
    if repeats is not None:
        parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds (default {repeats})")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="OUT", help="default benchmarks/results"
    )
    if layers is not None:
        parser.add_argument("--model", metavar="PATH", help="instead of a random model")
        parser.add_argument("--layers", type=int, metavar="N", help=f"of it (default {layers})")
    if add_own is not None:
        add_own(parser)
    args = parser.parse_args()
    for option in ("repeats", "layers"):
        if (value := getattr(args, option, None)) is not None and value < 1:
            parser.error(f"--{option} must be 1 or more")
    rounds = 1
    if repeats is not None:
        rounds = args.repeats or (quick_repeats if args.quick else repeats)
    return Setting(
        name,
        args.quick,
        rounds,
        folder_of(args.out, args.quick),
        None if layers is None else args.model,
        0 if layers is None else args.layers or layers,
        args,
        machine(),
        time.perf_counter(),
    )


def machine() -> Record:
    """What the numbers depend on; nothing that tells one machine from another of its kind."""
    mac = platform.mac_ver()[0]
    return {
        "platform": f"macOS {mac}" if mac else platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlx_engine": version("mlx-engine"),
    }


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of a round: each name is first in its turn."""
    start = turn % len(names)
    return names[start:] + names[:start]


@contextmanager
def model_folder(setting: Setting) -> Iterator[str]:
    """The model to use; a random one lives as long as the ``with`` block."""
    if setting.model is not None:
        yield setting.model
        return
    with random_model(setting.layers) as folder:  # 2 layers are 0.7 ms a token, 3 about 1 ms
        yield folder


@contextmanager
def random_model(layers: int, **other: Any) -> Iterator[str]:
    """One of the tests' kind, with ``other`` entries in its config.json.

    It is made in a process of its own, since making it is MLX work and the benchmark's belongs
    to the MLX thread.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "model"))
        program = [sys.executable, "-m", "tests.tiny", folder, "--layers", str(layers)]
        subprocess.run([*program, "--other", json.dumps(other)], cwd=ROOT, check=True)
        yield folder
