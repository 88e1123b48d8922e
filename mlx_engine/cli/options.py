"""The arguments of the command, and their way into ``SamplingParams`` and the engine.

An option that was not given is absent from the namespace, not set to a default: defaults
live in ``SamplingParams`` and ``ModelConfig``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mlx_engine import __version__
from mlx_engine.config import DEMO_MODEL, ModelConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.params import SamplingParams

PROGRAM = "mlx-engine"

_MODEL_HELP = "folder, Hugging Face id, or 'demo', a small built-in model (default)"
# Options of the command whose names are not those of the library with hyphens.
_SPELLINGS = {"stop_token_ids": "--stop-token-id"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``command`` names the module that does it."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "generate":
        if args.raw and args.system is not None:
            parser.error("argument --system: not allowed with --raw, which sends no messages")
        if "logprobs" in args and not args.json:
            parser.error("argument --logprobs: needs --json, which shows them")
    return args


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Checked before any model is loaded.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    options = _given(args, SamplingParams)
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    return SamplingParams(**options)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of an engine, the model included."""
    return _given(args, ModelConfig)


def spelled(error: InvalidRequest) -> str:
    """The error's message, with the option as it is spelled here."""
    names = {field.name for kind in (SamplingParams, ModelConfig) for field in fields(kind)}
    message = str(error)
    if error.option not in names:
        return message
    option = _SPELLINGS.get(error.option, f"--{error.option.replace('_', '-')}")
    return f"argument {option}: {message.removeprefix(f'{error.option}: ')}"


def _given(args: argparse.Namespace, kind: type[SamplingParams | ModelConfig]) -> dict[str, Any]:
    given = vars(args)
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="MLX language models in the terminal.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    source, cache, sampling = _source_options(), _cache_options(), _sampling_options()

    generate = commands.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer PROMPT and stream the answer to standard output.",
        parents=[source, cache, sampling],
        allow_abbrev=False,
    )
    generate.add_argument("prompt", metavar="PROMPT", help="text, or - to read standard input")
    generate.add_argument(
        "--raw", action="store_true", help="continue PROMPT as it is, without chat template"
    )
    generate.add_argument(
        "--json", action="store_true", help="print the whole result as one JSON object"
    )
    generate.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="report log-probabilities of each token and of the N best ones; needs --json",
    )

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation. Ctrl-C stops an answer, Ctrl-D ends.",
        parents=[source, cache, sampling],
        allow_abbrev=False,
    )
    for command in (generate, chat):
        command.add_argument("--model", metavar="MODEL", default=DEMO_MODEL, help=_MODEL_HELP)
        command.add_argument("--system", metavar="TEXT", help="system message")
        command.add_argument(
            "--verbose", action="store_true", help="print statistics to standard error"
        )

    info = commands.add_parser(
        "info",
        help="describe a model",
        description="Describe a model without loading its weights.",
        parents=[source],
        allow_abbrev=False,
    )
    info.add_argument("model", metavar="MODEL", nargs="?", default=DEMO_MODEL, help=_MODEL_HELP)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _group(title: str) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    return parser, parser.add_argument_group(title)


def _source_options() -> argparse.ArgumentParser:
    parser, group = _group("model")
    add = group.add_argument
    add("--revision", metavar="NAME", help="branch, tag or commit of the repository")
    add("--trust-remote-code", action="store_true", help="run Python code of the model")
    return parser


def _cache_options() -> argparse.ArgumentParser:
    parser, group = _group("adapters and KV cache")
    add = group.add_argument
    add("--adapter-path", metavar="FOLDER", help="LoRA adapters to apply")
    add("--context-length", type=int, metavar="N", help="tokens of prompt and answer together")
    add("--max-kv-size", type=int, metavar="N", help="tokens that the KV cache holds at most")
    add("--kv-bits", type=int, metavar="N", help="quantise the KV cache: 2, 3, 4, 5, 6 or 8")
    add("--kv-group-size", type=int, metavar="N", help="values that share a scale in it")
    add("--quantized-kv-start", type=int, metavar="N", help="tokens from which on it is quantised")
    add("--prefill-step-size", type=int, metavar="N", help="tokens per prefill chunk")
    add("--prompt-cache-bytes", type=int, metavar="N", help="bytes of earlier prompts to keep")
    return parser


def _sampling_options() -> argparse.ArgumentParser:
    parser, group = _group("sampling")
    add = group.add_argument
    add(
        "--max-tokens",
        type=_count_or_none,
        metavar="N",
        help="most tokens to generate; 'none': as many as the context holds",
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
        type=_bias,
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


def _count_or_none(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'none', not {text!r}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be TOKEN=VALUE, not {text!r}") from None
