"""What every benchmark needs before it can measure: arguments, and a model folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Setting:
    """How to run a benchmark.

    Attributes:
        quick: a run of seconds, to see that it works; its numbers are no result.
        repeats: rounds of each measurement.
        out: folder for JSON and plots.
        model: folder or name of a model; ``None`` is a random one.
        layers: of the random one.
    """

    quick: bool
    repeats: int
    out: Path
    model: str | None
    layers: int


def parse_setting(
    description: str, *, repeats: int, quick_repeats: int = 3, layers: int = 2
) -> Setting:
    """The command line of a benchmark.

    Args:
        description: printed by ``--help``.
        repeats: the default.
        quick_repeats: the default with ``--quick``.
        layers: of the random model, by default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds (default {repeats})")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--model", metavar="PATH", help="instead of a random model")
    parser.add_argument("--layers", type=int, metavar="N", help=f"of it (default {layers})")
    args = parser.parse_args()
    for option in ("repeats", "layers"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option} must be 1 or more")
    default = quick_repeats if args.quick else repeats
    return Setting(args.quick, args.repeats or default, args.out, args.model, args.layers or layers)


@contextmanager
def model_folder(setting: Setting) -> Iterator[str]:
    """The model to use; a random one lives as long as the ``with`` block."""
    if setting.model is not None:
        yield setting.model
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "model"))
        # The tests' random model: 2 layers are 0.7 ms a token, 3 about 1 ms. In a process of
        # its own, since making it is MLX work and the benchmark's belongs to the MLX thread.
        program = [sys.executable, "-m", "tests.tiny", folder, "--layers", str(setting.layers)]
        subprocess.run(program, cwd=_ROOT, check=True)
        yield folder
