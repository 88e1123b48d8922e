"""The arguments of the command, and their way into ``SamplingParams`` and the engine.

An option that was not given is absent from the namespace, not set to a default: defaults
live in ``SamplingParams`` and ``EngineConfig``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mlx_engine import __version__
from mlx_engine.agents import AGENTS
from mlx_engine.cli.constraint import add_constraints, constraint_of
from mlx_engine.cli.flags import add_flags, flag_of, option_group
from mlx_engine.cli.parser import PROGRAM, Parser
from mlx_engine.cli.sampling_options import sampling_options
from mlx_engine.cli.serve_options import DEFAULT_PORT, serve_options
from mlx_engine.cli.values import count_or_auto, number_or_none, request_limit, topic
from mlx_engine.config import DEMO_MODEL, BatchConfig, ModelConfig, QueueConfig
from mlx_engine.limits import RequestLimits
from mlx_engine.params import SamplingParams
from mlx_engine.strategies import MTP, DraftModel, SpecPrefill

_MODEL_HELP = "folder, Hugging Face id, or 'demo', a small built-in model (default)"
# Of what info takes as well.
_SOURCE = ("revision", "trust_remote_code", "tool_format", "reasoning_format")


# Options that mean nothing without another one.
_NEEDS = {
    "num_draft_tokens": "draft_model",
    "mtp_head": "mtp",
    "keep": "prefill_draft",
    "threshold": "prefill_draft",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``command`` names the module that does it."""
    parser = whole_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    _take_words(args, parser)
    if args.command == "generate":
        for option in ("system", *chat_options(args)) if args.raw else ():
            if vars(args)[option] is not None:
                flag = flag_of(option)
                parser.error(f"argument {flag}: not allowed with --raw, which sends no messages")
        if "logprobs" in args and not args.json:
            parser.error("argument --logprobs: needs --json, which shows them")
    if "memory_bytes" in args and not args.memory_table:
        parser.error("argument --memory-bytes: needs --memory")
    if args.command in ("host", "serve") and args.engine == "simple":
        for option in _given(args, BatchConfig):
            parser.error(f"argument {flag_of(option)}: not allowed with --engine simple")
    if "mtp" in args and "draft_model" in args:
        parser.error("argument --mtp: not allowed with --draft-model")
    for option, needed in _NEEDS.items():
        if option in args and needed not in args:
            parser.error(f"argument {flag_of(option)}: needs {flag_of(needed)}")
    return args


def _take_words(args: argparse.Namespace, parser: Parser) -> None:
    """Take models that were given without ``--model`` for those that they are."""
    given = vars(args)
    if (words := given.pop("words", None)) is not None:
        args.models = [*words, *(args.models or ())]
    if "word" in given:
        word = given.pop("word")
        if None not in (word, args.model):
            parser.error(f"one model is enough, and there are two: {word} and {args.model}")
        args.model = next((one for one in (word, args.model) if one is not None), DEMO_MODEL)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Checked before any model is loaded.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    options = _given(args, SamplingParams)
    if "logit_bias" in options:
        options["logit_bias"] = dict(options["logit_bias"])
    return SamplingParams(**options, constraint=constraint_of(args))


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` that were given."""
    given = vars(args)
    return {name: given[name] for name in ("thinking", "max_reasoning_tokens") if name in given}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of an engine, the model included.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    chosen = dict[str, Any]()
    for kind in (ModelConfig, QueueConfig, BatchConfig):
        chosen |= _given(args, kind)
    if "limits" in args:
        chosen["limits"] = RequestLimits(**dict(args.limits))
    if "mtp" in args:
        chosen["decode"] = MTP(args.mtp, head=vars(args).get("mtp_head"))
    elif "draft_model" in args:
        chosen["decode"] = DraftModel(**_given(args, DraftModel) | {"model": args.draft_model})
    if "prefill_draft" in args:
        chosen["prefill"] = SpecPrefill(**_given(args, SpecPrefill) | {"draft": args.prefill_draft})
    return chosen


def _given(args: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    given = vars(args)
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def whole_parser() -> Parser:
    """The parser, with all commands."""
    parser = Parser(prog=PROGRAM, description="MLX language models in the terminal.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    source, model = _source_options(), [_cache_options(), _path_options()]
    _add_generate(parser, [source, *model, sampling_options()])
    _add_chat(parser, [source, *model, sampling_options()])
    _add_host(parser, [source, *model, _queue_options(), _host_options()])
    _add_serve(parser, [serve_options(), source, *model, _queue_options()])
    _add_launch(parser)
    _add_info(parser, [source])
    _add_selftest(parser, [source, *model])
    _add_extract_mtp(parser)
    _add_help(parser)
    return parser


def _add_generate(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "generate",
        help="answer one prompt",
        description="Answer PROMPT and stream the answer to standard output.",
        parents=options,
    )
    command.add_argument("prompt", metavar="PROMPT", help="text, or - to read standard input")
    command.add_argument(
        "--raw", action="store_true", help="continue PROMPT as it is, without chat template"
    )
    command.add_argument(
        "--json", action="store_true", help="print the whole result as one JSON object"
    )
    command.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="report log-probabilities of each token and of the N best ones; needs --json",
    )
    command.add_argument("--model", metavar="MODEL", default=DEMO_MODEL, help=_MODEL_HELP)
    add_constraints(command)
    _add_talk(command)


def _add_chat(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "chat",
        help="talk with a model",
        description="A conversation. Ctrl-C stops an answer, Ctrl-D ends.",
        parents=options,
    )
    _add_model(command)
    _add_talk(command)


def _add_talk(command: argparse.ArgumentParser) -> None:
    """Add the options that ``generate`` and ``chat`` have in common."""
    command.add_argument("--system", metavar="TEXT", help="system message")
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="switch reasoning on or off, where the model has such a switch",
    )
    command.add_argument(
        "--max-reasoning-tokens",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="close the reasoning after N tokens, and go on with the answer",
    )
    command.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=argparse.SUPPRESS,
        help="of work for an answer, which then ends as it is",
    )
    command.add_argument(
        "--verbose", action="store_true", help="print statistics to standard error"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    """Add the model, which may be given with its name, too."""
    command.add_argument("word", metavar="MODEL", nargs="?", help=_MODEL_HELP)
    command.add_argument("--model", metavar="MODEL", help=argparse.SUPPRESS)


def _add_host(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "host",
        help="serve a model to several programs on a Unix socket",
        description="Load MODEL once and serve it on a Unix socket, to RemoteEngine(PATH) in the "
        "programs of the same user. SIGTERM or Ctrl-C lets requests in flight finish; a second "
        "one aborts them.",
        parents=options,
    )
    _add_model(command)
    command.add_argument("--socket", metavar="PATH", required=True, help="where to listen")


def _add_serve(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "serve",
        rest="words",
        help="serve a model by HTTP, to clients of OpenAI's API and to agents",
        description="Load a model and serve it by HTTP; or several, each when it is asked for. "
        "SIGTERM or Ctrl-C lets requests in flight finish; a second one aborts them.",
        parents=options,
    )
    command.add_argument(
        "words",
        metavar="[NAME=]MODEL",
        nargs="*",
        help=f"{_MODEL_HELP}; clients may know it by NAME. With several, each is loaded when the "
        "first request names it",
    )
    command.add_argument(
        "--model", dest="models", action="append", metavar="[NAME=]MODEL", help="the same"
    )


def _add_launch(commands: Parser) -> None:
    command = commands.add(
        "launch",
        help="run a coding agent on a local model",
        description="Run AGENT with its settings for the server at --port; if there is none, start "
        "one, and stop it behind the agent.",
    )
    add = command.add_argument
    add("--model", metavar="MODEL", help=_MODEL_HELP)
    add("--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"{DEFAULT_PORT} by default")
    add("--print", dest="print_only", action="store_true", help="only show the settings")
    add("agent", metavar="AGENT", choices=AGENTS, help=", ".join(AGENTS))
    add("arguments", metavar="...", nargs=argparse.REMAINDER, help="the agent's own")


def _add_info(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "info",
        help="describe a model",
        description="Describe a model without loading its weights.",
        parents=options,
    )
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--memory",
        dest="memory_table",
        action="store_true",
        help="show what it takes by context, requests at once and bits of its KV cache",
    )
    command.add_argument(
        "--memory-bytes",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="of a machine to plan for instead of this one; needs --memory",
    )


def _add_selftest(commands: Parser, options: list[argparse.ArgumentParser]) -> None:
    command = commands.add(
        "selftest",
        help="cancel everything, at every moment, and see what becomes of it",
        description="Cancel requests to MODEL, and its start and stop, in all ways and at as many "
        "moments as there is time for; print a report in Markdown.",
        parents=options,
    )
    _add_model(command)
    add = command.add_argument
    add(
        "--engine",
        choices=("simple", "batched", "process"),
        default="simple",
        help="one request at a time (default), many in one batch, or in a process of its own",
    )
    add("--seconds", type=float, metavar="N", default=60.0, help="to spend on it; 60 by default")
    add("--seed", type=int, metavar="N", default=0, help="of the draw of moments")
    add("--only", metavar="TEXT", help="an operation, or what a failure says of its place")
    add(
        "--exact",
        action="store_const",
        const=True,
        help="requests have the same tokens in every batch, as in float32",
    )


def _add_extract_mtp(commands: Parser) -> None:
    add = commands.add(
        "extract-mtp",
        help="take a model's MTP head out of its original checkpoint",
        description="Write the MTP head of CHECKPOINT, which a conversion drops, to OUT.",
    ).add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder with config.json and model*.safetensors")
    add("out", metavar="OUT", help="file, or folder of the converted model: mtp.safetensors there")
    add("--q-bits", type=int, metavar="N", help="quantise linear layers: 2, 3, 4, 5, 6 or 8")
    add("--q-group-size", type=int, metavar="N", default=64, help="values that share a scale")


def _add_help(commands: Parser) -> None:
    commands.add(
        "help",
        help="show the guide: its topics, or one of them",
        description="Show what the guide says of TOPIC, in Markdown; without one, list the topics.",
    ).add_argument("topic", metavar="TOPIC", nargs="?", type=topic, help="one of the guide's")


def _source_options() -> argparse.ArgumentParser:
    parser, group = option_group("model")
    add_flags(group, ModelConfig, only=_SOURCE)
    return parser


def _cache_options() -> argparse.ArgumentParser:
    parser, group = option_group("adapters and KV cache")
    add_flags(group, ModelConfig, but=_SOURCE)
    return parser


def _path_options() -> argparse.ArgumentParser:
    parser, group = option_group("faster decoding and prefill")
    add = group.add_argument
    add("--draft-model", metavar="MODEL", help="a small model with the same tokenizer proposes")
    add_flags(group, DraftModel)
    add(
        "--mtp",
        type=count_or_auto,
        metavar="N",
        nargs="?",
        const="auto",
        help="the model's own head proposes N tokens at a time, 1 to 4, or 'auto' (default)",
    )
    add("--mtp-head", metavar="FILE", help="what extract-mtp wrote, if not in the model's folder")
    add("--prefill-draft", metavar="MODEL", help="SpecPrefill: a small model scores long prompts")
    add_flags(group, SpecPrefill)
    return parser


def _queue_options() -> argparse.ArgumentParser:
    parser, group = option_group("requests")
    add = group.add_argument
    add(
        "--engine",
        choices=("simple", "batched"),
        default="batched",
        help="one request at a time, or many in one batch (default)",
    )
    add_flags(group, BatchConfig)
    add_flags(group, QueueConfig)
    add(
        "--limit",
        dest="limits",
        type=request_limit,
        action="append",
        metavar="LIMIT=N",
        help="on the size of a request, as in RequestLimits, or LIMIT=none; may be repeated",
    )
    add(
        "--drain",
        type=number_or_none,
        default=30.0,
        metavar="SECONDS",
        help="for requests in flight to finish at the end; 30 by default, 'none': no limit",
    )
    return parser


def _host_options() -> argparse.ArgumentParser:
    parser, group = option_group("clients")
    add = group.add_argument
    add("--max-clients", type=int, metavar="N", help="connected at once; others are refused")
    add(
        "--cache-folder",
        metavar="DIR",
        help="where clients may keep prompt caches, by plain names; by default nowhere",
    )
    return parser
