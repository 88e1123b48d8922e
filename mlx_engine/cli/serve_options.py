"""The arguments of ``serve`` that are not an engine's."""

from __future__ import annotations

import argparse

from mlx_engine.cli.flags import add_flags, option_group
from mlx_engine.cli.values import number_or_none
from mlx_engine.params import SamplingParams

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8080
KEYS_VARIABLE = "MLX_ENGINE_API_KEY"

# Sampling parameters for which a server has defaults: those of taste, not of one answer.
_TASTE = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def serve_options() -> argparse.ArgumentParser:
    """Where to listen, to whom, and what is taken for granted."""
    parser, group = option_group("server")
    add = group.add_argument
    add(
        "--host",
        default=DEFAULT_HOST,
        metavar="ADDRESS",
        help=f"where to listen; {DEFAULT_HOST} by default. Others can be reached from elsewhere, "
        "and need keys",
    )
    add(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help=f"{DEFAULT_PORT} by default; 0 takes one that is free",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help=f"keys, one a line, of which a client needs one; or ${KEYS_VARIABLE}, in which they "
        "are separated by commas",
    )
    add(
        "--allow-host",
        dest="allowed_hosts",
        action="append",
        metavar="NAME",
        help="another name for clients to call this server by, as behind a proxy; may be repeated",
    )
    add(
        "--served-name",
        dest="served_names",
        action="append",
        metavar="NAME",
        help="what clients call the only model, in the place of its own name; may be repeated",
    )
    add(
        "--idle-timeout",
        type=number_or_none,
        metavar="SECONDS",
        help="unload a model that nobody has asked for so long; by default it stays",
    )
    add(
        "--max-models",
        type=int,
        metavar="N",
        help="in memory at once; by default as many as half of the memory holds",
    )
    add(
        "--in-process",
        action="store_true",
        default=False,
        help="no process of its own for the engine",
    )
    add("--quiet", action="store_true", default=False, help="no line for each request")
    defaults = parser.add_argument_group("sampling, for what requests leave open")
    defaults.add_argument("--temperature", "--temp", type=float, metavar="N", help="0 is greedy")
    add_flags(defaults, SamplingParams, only=_TASTE)
    return parser
