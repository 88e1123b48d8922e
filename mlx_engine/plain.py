"""Results as plain data, and as a line that can be read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.other_attributes import WithAdvice

_LONGEST = 200  # characters of a text in a line
_MOST = 8  # elements of a list in it


class PlainData(WithAdvice):
    """Dataclasses of ours, as data that JSON has a form for."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data: dictionaries, lists, text and numbers."""
        made: dict[str, Any] = plain(self)
        return made


def plain_result(result: Any, *, tokens: bool) -> dict[str, Any]:
    """A ``GenerationResult`` as data that JSON has a form for."""
    made: dict[str, Any] = plain(dataclasses.replace(result, parsed=None))
    if not tokens:
        del made["tokens"]
    if result.parsed is not None:  # of whatever type, it was made of the text
        made["parsed"] = json.loads(result.text)
    return made


def plain(value: object) -> Any:
    """A value of ours as dictionaries, lists, text and numbers; a number that JSON has no form
    for, as minus infinity, becomes ``None``.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | bytes):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(option: str, value: object) -> str:
    """The JSON of a value that a caller has given as ``option``.

    Raises:
        InvalidRequest: it has none.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            option, f"must be text, or have a form in JSON, not {shown(value)} ({error})"
        ) from error


def short_repr(value: Any) -> str:
    """The ``repr`` of a dataclass: fields at their defaults are left out, long ones cut."""
    parts = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            parts.append(f"{field.name}={_short(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]!r}... ({len(value)} characters)"
    if isinstance(value, list | tuple) and len(value) > _MOST:
        return f"<{len(value)}>"
    return repr(value)
