"""Stand-ins for the variables of a chat template, in conversations that only find out its traits.

They keep what a template can branch on and drop the rest, so that values that change with each
request, such as documents and dates, have the same stand-in, which is small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

_SHORT = 32  # characters of a word that may say how something is done
_FEW = 16  # numbers up to this one may do so too
_PARTS = 8  # of a list or a mapping
_DEPTH = 4  # of lists and mappings in each other
_TEXT = "text"
_DIGIT = re.compile(r"\d")


def stand_ins(variables: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Stand-ins for variables, by name, in the order of the names.

    Args:
        source: text of the template: words and numbers that it has are kept.
    """
    return {name: _stand_in(variables[name], source, 0) for name in sorted(variables)}


def key_of(alike: object) -> str:
    """A text that is the same for stand-ins that are alike; others' objects are so by type."""
    return json.dumps(alike, default=lambda value: type(value).__qualname__)


def _stand_in(value: object, source: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        kept = abs(value) <= _FEW or (abs(value) < 10**_SHORT and str(value) in source)
        return int(value) if kept else (_FEW + 1) * (1 if value > 0 else -1)
    if isinstance(value, float):
        return 0.5 if value > 0 else -0.5 if value < 0 else 0.0
    if isinstance(value, str):
        return _of_text(value, source, depth)
    if isinstance(value, Mapping):
        return _of_mapping(value, source, depth)
    if isinstance(value, list | tuple):
        return _of_list(value, source, depth)
    return value  # an object of the caller's: nothing else can stand for it


def _of_text(value: str, source: str, depth: int) -> str:
    if not value.strip():
        return value[:1]
    if len(value) > _SHORT:
        return _TEXT
    if f"'{value}'" in source or f'"{value}"' in source:
        return value
    # Most short texts with digits are dates: those of all days are alike.
    return _TEXT if depth else _DIGIT.sub("1", value)


def _of_mapping(value: Mapping[Any, Any], source: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in islice(value, _PARTS if depth < _DEPTH else 0):
        if isinstance(name, str) and len(name) <= _SHORT:
            found[name] = _stand_in(value[name], source, depth + 1)
    return found


def _of_list(value: list[Any] | tuple[Any, ...], source: str, depth: int) -> list[Any]:
    found: dict[str, Any] = {}  # those that differ
    for each in value[: _PARTS if depth < _DEPTH else 0]:
        stand_in = _stand_in(each, source, depth + 1)
        found.setdefault(key_of(stand_in), stand_in)
    return list(found.values())
