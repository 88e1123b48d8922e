"""What every benchmark needs before it can measure: arguments, and a model folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
        own: all arguments, with those that only this benchmark has.
    """

    quick: bool
    repeats: int
    out: Path
    model: str | None
    layers: int
    own: argparse.Namespace


def parse_setting(
    description: str,
    *,
    repeats: int | None,
    quick_repeats: int = 3,
    layers: int = 2,
    add_own: Callable[[argparse.ArgumentParser], object] | None = None,
) -> Setting:
    """The command line of a benchmark.

    Args:
        description: printed by ``--help``.
        repeats: the default; ``None`` for a benchmark of one round, without the option.
        quick_repeats: the default with ``--quick``.
        layers: of the random model, by default.
        add_own: adds the benchmark's own options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, metavar="N", help=f"rounds (default {repeats})")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", metavar="DIR")
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
    return Setting(args.quick, rounds, args.out, args.model, args.layers or layers, args)


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
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "model"))
        # The tests' random model: 2 layers are 0.7 ms a token, 3 about 1 ms. In a process of
        # its own, since making it is MLX work and the benchmark's belongs to the MLX thread.
        program = [sys.executable, "-m", "tests.tiny", folder, "--layers", str(setting.layers)]
        subprocess.run(program, cwd=_ROOT, check=True)
        yield folder
