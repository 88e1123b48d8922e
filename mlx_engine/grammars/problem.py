"""Problems of a constraint, with the place in it."""

from __future__ import annotations

import re

from mlx_engine.errors import InvalidRequest

_PLAIN = re.compile(r"[\w$-]{1,64}")
_LONGEST = 200  # characters of a place

Place = tuple[str | int, ...]


def problem(place: Place, text: str) -> InvalidRequest:
    """The error for what is wrong at a place."""
    return InvalidRequest("constraint", f"{named(place)}: {text}" if place else text)


def named(place: Place) -> str:
    """A place as one reads it: ``properties.a.items[0]``."""
    parts: list[str] = []
    for step in place:
        if isinstance(step, str) and _PLAIN.fullmatch(step):
            parts.append(f".{step}")
        else:
            parts.append(f"[{step!r:.70}]")
    name = "".join(parts).removeprefix(".")
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
