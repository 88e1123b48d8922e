"""Arguments made from the fields of the library's values: their names, types, defaults and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from mlx_engine.checks import options_of
from mlx_engine.cli.values import (
    count_or_auto,
    count_or_none,
    memory_or_auto,
    number_or_none,
)
from mlx_engine.config import BatchConfig, ModelConfig, QueueConfig
from mlx_engine.errors import InvalidRequest
from mlx_engine.params import SamplingParams

# Options of the command whose names are not those of the library with hyphens.
SPELLINGS = {
    "stop_token_ids": "--stop-token-id",
    "depth": "--mtp",
    "keep": "--prefill-keep",
    "threshold": "--prefill-threshold",
    "path": "--socket",
}


def flag_of(option: str) -> str:
    """An option of the library, as it is spelled here."""
    return SPELLINGS.get(option, f"--{option.replace('_', '-')}")


def default_of(kind: type[Any], option: str) -> Any:
    """The default of a field of a dataclass."""
    return next(field.default for field in fields(kind) if field.name == option)


def option_group(title: str) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """A parser to be a parent of others, and its group of arguments, which set no defaults."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    return parser, parser.add_argument_group(title)


def add_flags(
    group: argparse._ArgumentGroup,
    kind: type[Any],
    only: Collection[str] = (),
    but: Collection[str] = (),
) -> None:
    """Add an argument for each field of a dataclass that has a help.

    Args:
        only: some of them.
        but: others than these.
    """
    hints = get_type_hints(kind)
    for name, option in options_of(kind).items():
        if not option.help or (only and name not in only) or name in but:
            continue
        default = default_of(kind, name)
        told = option.help.replace("%", "%%")
        if hints[name] is bool:
            group.add_argument(flag_of(name), dest=name, action="store_true", help=told)
            continue
        if default is not None:
            shown = f"{default:g}" if isinstance(default, float) else repr(default)
            told += f"; {shown} by default"
        reads = _reader(hints[name], default)
        if reads in (count_or_none, number_or_none):
            told += ", 'none': no limit"
        words = name.rpartition("_")[2].upper() if reads is str else "N"
        group.add_argument(flag_of(name), dest=name, type=reads, metavar=words, help=told)


def _reader(hint: Any, default: object) -> Callable[[str], object]:
    """The type of an argument, to argparse; ``None`` is left out, unless it is no default."""
    kinds = get_args(hint) or (hint,)
    if {str, float} <= {*kinds}:
        return memory_or_auto
    if any(str in map(type, get_args(one)) for one in kinds):  # Literal["auto"]
        return count_or_auto
    if NoneType in kinds and default is not None:
        return number_or_none if float in kinds else count_or_none
    kind: Callable[[str], object] = next(one for one in kinds if one is not NoneType)
    return kind


def spelled(error: InvalidRequest) -> str:
    """The error's message, with the option as it is spelled here."""
    kinds = (SamplingParams, ModelConfig, QueueConfig, BatchConfig)
    names = {field.name for kind in kinds for field in fields(kind)} | {*SPELLINGS}
    names |= {"num_draft_tokens", "q_bits", "q_group_size", "seconds", "only", "max_clients"}
    names |= {"cache_folder", "thinking", "max_reasoning_tokens", "host", "port", "api_key_file"}
    names |= {"idle_timeout", "max_models", "served_name", "memory_bytes"}
    names |= {"schema", "regex", "grammar", "choice", "timeout"}
    message = str(error)
    if error.option not in names:
        return message
    return f"argument {flag_of(error.option)}: {message.removeprefix(f'{error.option}: ')}"
