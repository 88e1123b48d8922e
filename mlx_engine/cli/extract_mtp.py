"""``mlx-engine extract-mtp``: a model's MTP head, from its original checkpoint into a file."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from mlx_engine.cli import interrupts
from mlx_engine.models.mtp_extract import extract_mtp


def run(args: argparse.Namespace) -> int:
    """Write the head's file; the exit code."""
    # MLX works on this thread: the command does nothing else, so there is no other.
    with interrupts.on_ctrl_c(signal.default_int_handler):
        head = extract_mtp(
            Path(args.checkpoint).expanduser(),
            Path(args.out).expanduser(),
            q_bits=args.q_bits,
            q_group_size=args.q_group_size,
        )
    sys.stdout.write(
        f"{head.path}: MTP head of the {head.family} family, "
        f"{head.tensors} tensors, {head.bytes / 1e6:,.1f} MB\n"
    )
    return 0
