"""``mlx-engine selftest``: whether cancelling is safe, on this machine and with this model.

Exit codes: 0 if it is, 1 if not.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from mlx_engine.cli import interrupts
from mlx_engine.cli.options import engine_options
from mlx_engine.cli.output import ProgressBar, say
from mlx_engine.engine.base import BaseEngine
from mlx_engine.engine.batched import BatchedEngine
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.remote.process_engine import ProcessEngine
from mlx_engine.testing.safety.check import PROMPT, check_cancellation

_KINDS: dict[str, Callable[..., BaseEngine]] = {
    "simple": SimpleEngine,
    "batched": BatchedEngine,
    "process": ProcessEngine,
}
_CHUNK = 16  # tokens, so that the prompt has several


def run(args: argparse.Namespace) -> int:
    """Check an engine, and print the report; the exit code."""
    bar = ProgressBar()
    options = {"prefill_step_size": _CHUNK, **engine_options(args)}

    def tell(line: str) -> None:
        bar.clear()
        say(line)

    def make() -> BaseEngine:
        return _KINDS[args.engine](**options, on_progress=bar)

    # The engines have a thread of their own; this one only waits.
    with interrupts.on_ctrl_c(signal.default_int_handler):
        report = check_cancellation(
            make,
            prompt=PROMPT,
            seconds=args.seconds,
            seed=args.seed,
            only=args.only,
            exact=args.exact,
            say=tell,
        )
    bar.clear()
    sys.stdout.write(f"{report}\n")
    return 1 if report.failures else 0
