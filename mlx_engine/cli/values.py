"""Values of arguments, out of their text."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TypedDict

from mlx_engine.checks import checked_time_limit, number, size_of
from mlx_engine.cli import guide
from mlx_engine.limits import RequestLimits


class TimeLimit(TypedDict, total=False):
    """How long an answer may take; a keyword argument of every request."""

    timeout: float | None


def time_limit(args: argparse.Namespace) -> TimeLimit:
    """The time limit, if one was given.

    Raises:
        InvalidRequest: it is out of its range.
    """
    return {"timeout": checked_time_limit(args.timeout)} if "timeout" in args else {}


def count_or_none(text: str) -> int | None:
    """A number, or ``None`` for 'none'."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'none', not {text!r}") from None


def number_or_none(text: str) -> float | None:
    """0 or more, or ``None`` for 'none'."""
    if text.lower() == "none":
        return None
    try:
        return number("", float(text), low=0, endless=True)
    except ValueError:
        said = f"must be 0 or more, or 'none', not {text!r}"
        raise argparse.ArgumentTypeError(said) from None


def count_or_auto(text: str) -> int | str:
    """A number, or 'auto'."""
    if text.lower() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'auto', not {text!r}") from None


def memory_or_auto(text: str) -> int | float | str:
    """Bytes such as 8000000000 or 8GB, a part such as 0.5, or 'auto'."""
    if text.lower() == "auto":
        return "auto"
    if (size := size_of(text)) is not None:
        return size
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        said = f"must be bytes such as 8GB, a part such as 0.5, or 'auto', not {text!r}"
        raise argparse.ArgumentTypeError(said) from None


def bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be TOKEN=VALUE, not {text!r}") from None


def request_limit(text: str) -> tuple[str, int | None]:
    """The name of a limit, and how many there may be."""
    name, _, value = text.partition("=")
    names = [field.name for field in fields(RequestLimits)]
    if name not in names:
        raise argparse.ArgumentTypeError(f"must be LIMIT=N, with one of {', '.join(names)}")
    return name, count_or_none(value)


def topic(text: str) -> str:
    """The name of a topic of the guide, or a word that can mean one only."""
    near = guide.meant(text)
    if text in guide.topics() or len(near) == 1:
        return text
    found = ", ".join(map(repr, near or [guide.nearest(text)]))
    raise argparse.ArgumentTypeError(
        f"there is no topic {text!r}; near {'is' if len(near) < 2 else 'are'} {found} "
        "('mlx-engine help' lists all)"
    )
