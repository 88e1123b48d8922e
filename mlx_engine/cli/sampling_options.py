"""The arguments that say how tokens are chosen."""

from __future__ import annotations

import argparse

from mlx_engine.cli.flags import add_flags, option_group
from mlx_engine.cli.values import bias
from mlx_engine.params import SamplingParams


def sampling_options() -> argparse.ArgumentParser:
    """The fields of ``SamplingParams``."""
    parser, group = option_group("sampling")
    add = group.add_argument
    add("--temperature", "--temp", type=float, metavar="N", help="0 is greedy")
    add_flags(group, SamplingParams)
    add(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="TOKEN=VALUE",
        help="add VALUE to the logit of a token id; may be repeated",
    )
    add("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")
    add(
        "--stop-token-id",
        dest="stop_token_ids",
        type=int,
        action="append",
        metavar="N",
        help="ends the answer; may be repeated",
    )
    return parser
