"""The arguments that say how tokens are chosen."""

from __future__ import annotations

import argparse

from mlx_engine.cli.flags import default_of, option_group
from mlx_engine.cli.values import bias, count_or_none
from mlx_engine.params import SamplingParams


def sampling_options() -> argparse.ArgumentParser:
    """The fields of ``SamplingParams``."""
    parser, group = option_group("sampling")
    add = group.add_argument
    most = default_of(SamplingParams, "max_tokens")
    add(
        "--max-tokens",
        type=count_or_none,
        metavar="N",
        help=f"to generate; {most} by default, 'none': as many as the context holds",
    )
    add("--temperature", "--temp", type=float, metavar="X", help="0 is greedy")
    add("--top-p", type=float, metavar="P", help="nucleus sampling; 1 is off")
    add("--top-k", type=int, metavar="K", help="choose from the K most probable tokens; 0 is off")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the best one")
    add("--xtc-probability", type=float, metavar="P", help="chance to exclude top choices")
    add("--xtc-threshold", type=float, metavar="P", help="probability that makes a top choice")
    add("--repetition-penalty", type=float, metavar="X", help="factor on recent tokens; 1 is off")
    add("--presence-penalty", type=float, metavar="X", help="subtracted once from recent tokens")
    add("--frequency-penalty", type=float, metavar="X", help="subtracted per recent occurrence")
    add(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="TOKEN=VALUE",
        help="add VALUE to the logit of a token id; may be repeated",
    )
    add("--seed", type=int, metavar="N", help="makes sampling repeat")
    add("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")
    add(
        "--stop-token-id",
        dest="stop_token_ids",
        type=int,
        action="append",
        metavar="N",
        help="ends the answer; may be repeated",
    )
    add("--ignore-eos", action="store_true", help="go on after the end of the answer")
    return parser
