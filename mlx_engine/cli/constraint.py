"""The arguments that say what an answer must be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_engine.constraints import Choice, Constraint, Grammar, JSONSchema, Regex
from mlx_engine.errors import InvalidRequest, renamed

_MOST = 2**24  # bytes of a file
_KINDS: dict[str, Callable[[Any], Constraint]] = {
    "schema": lambda path: JSONSchema(_text("schema", path)),
    "regex": Regex,
    "grammar": lambda path: Grammar(_text("grammar", path)),
    "choice": Choice,
}


def add_constraints(command: argparse.ArgumentParser) -> None:
    """Add the arguments, of which one may be given."""
    title = command.add_argument_group("what the answer must be", "one of these; nothing else is")
    group = title.add_mutually_exclusive_group()
    for flag, metavar, told, more in (
        ("--schema", "FILE", "JSON that the JSON schema in FILE allows", {}),
        ("--regex", "PATTERN", "text that PATTERN matches as a whole, in Rust's syntax", {}),
        ("--grammar", "FILE", "text of the grammar in FILE, in llguidance's Lark", {}),
        ("--choice", "TEXT", "TEXT; repeated, one of these", {"action": "append"}),
    ):
        group.add_argument(flag, metavar=metavar, help=told, default=argparse.SUPPRESS, **more)  # type: ignore[arg-type]


def constraint_option(args: argparse.Namespace) -> str | None:
    """The name of the one that was given."""
    return next((name for name in _KINDS if name in args), None)


def constraint_of(args: argparse.Namespace) -> Constraint | None:
    """The constraint that was given.

    Raises:
        InvalidRequest: it is none, or its file cannot be read.
    """
    if (name := constraint_option(args)) is None:
        return None
    try:
        return _KINDS[name](vars(args)[name])
    except InvalidRequest as error:
        raise renamed(error, name) from error


def _text(option: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST + 1)
        if len(data) <= _MOST:
            return data.decode()
    except OSError as error:
        raise InvalidRequest(option, f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(option, f"{path} is not UTF-8 text ({error})") from error
    raise InvalidRequest(option, f"{path} has more than {_MOST} bytes")
