"""Strings that a schema allows, as a terminal for their plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.lark import ANY
from mlx_engine.chat.tool_schemas import NOTES, OfferedTool

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_WORD = r"[A-Za-z0-9_+\-]{1,32}"
# Days are those that every month has, since a regular expression does not know the others.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "email": rf"{_WORD}(\.{_WORD}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,3}}",
}
_KNOWN = {"type", "minLength", "maxLength", "pattern", "format"}
_CLASSES = {"d": "[0-9]", "w": "[A-Za-z0-9_]"}


def string_content(tool: OfferedTool, schema: Mapping[str, Any], char: str = "(?s:.)") -> str:
    """The terminal for a string that is written as it is.

    Args:
        tool: whose argument it is.
        schema: of the string.
        char: an expression for its characters.

    Raises:
        InvalidRequest: the schema has a keyword that cannot be enforced.
    """
    for key in schema.keys() - _KNOWN - NOTES:
        raise tool.refused(f"{key!r} cannot be enforced for text in this model's format")
    terms = []
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if low or high is not None:
        terms.append(f"/{char}{{{int(low)},{'' if high is None else int(high)}}}/")
    elif char != "(?s:.)":
        terms.append(f"/{char}*/")
    if isinstance(pattern := schema.get("pattern"), str):
        terms.append(f"/{_searched(pattern)}/")
    if (name := schema.get("format")) is not None:
        if name not in _FORMATS:
            raise tool.refused(f"format {name!r} cannot be enforced in this model's format")
        terms.append(f"/{_FORMATS[name]}/")
    return " & ".join(terms) or ANY


def _searched(pattern: str) -> str:
    """An expression for all text in which a schema's pattern is found."""
    begins = pattern.startswith("^")
    ends = re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    inner = re.sub(
        r"\\(.)|/", lambda found: _CLASSES.get(found[1] or "", found[0] if found[1] else r"\/"),
        inner, flags=re.DOTALL,
    )  # fmt: skip
    return ("" if begins else "(?s:.*)") + f"({inner})" + ("" if ends else "(?s:.*)")
