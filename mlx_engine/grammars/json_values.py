"""Values of JSON: copied so that nobody changes them, and constants that can be written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.grammars.problem import Place, problem

DEEPEST = 100  # lists and mappings within each other
MOST = 2**16  # values in all

_BITS = math.ceil(4_300 * math.log2(10))  # of what Python reads and writes
_EXACT = 2**53  # integers up to it are doubles
_DIGITS = 15  # of a number with a fraction, for which a double stands
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


def copied(value: object) -> Any:
    """A copy in Python's own types.

    Raises:
        InvalidRequest: it has something in it that JSON has no form for, or too much.
    """
    return _copied(value, (), [MOST])


def from_text(text: str) -> Any:
    """The value that a text is in JSON.

    Raises:
        InvalidRequest: it is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise problem((), f"is text that is no JSON: {error}") from error


def dumped(value: object) -> str:
    """The text of a value: the same for equal ones in the same order.

    Raises:
        InvalidRequest: it has text in it that no UTF-8 has.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise problem((), f"is not valid Unicode text ({error})") from error
    return text


def same(value: Any) -> str:
    """A text that is equal for values that JSON Schema takes for equal."""
    return json.dumps(_normal(value), sort_keys=True)


def check_writable(place: Place, value: Any) -> None:
    """See that a constant can be written as it is.

    Raises:
        InvalidRequest: it cannot.
    """
    if isinstance(value, str):
        check_text(place, value)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_writable((*place, number), item)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text((*place, key), key)
            check_writable((*place, key), item)
    elif value is not None and not isinstance(value, bool):
        check_number(place, value)


def check_text(place: Place, text: str) -> None:
    """See that a text can be written without escapes by number; raises ``InvalidRequest``."""
    if found := _UNWRITABLE.search(text):
        raise problem(place, f"the control character {found[0]!r} cannot be enforced")


def check_number(place: Place, value: object) -> int | float:
    """A number, if a double is exactly that.

    Raises:
        InvalidRequest: it is none, or too large or too fine.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem(place, f"must be a number, not {shown(value)}")
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    exact = abs(value) <= _EXACT
    if isinstance(value, float) and exact:
        exact = "e" not in repr(value) and len(repr(value).strip("-")) <= _DIGITS + 1
    if not exact:
        raise problem(place, f"{shown(value)} is too large or too fine to be enforced exactly")
    return value


def _copied(value: object, place: Place, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise problem((), f"has more than {MOST} values in it")
    if len(place) > DEEPEST:
        raise problem((), f"is nested deeper than {DEEPEST} levels, or in itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > _BITS:
            raise problem(place, f"is {shown(value)}")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise problem(place, f"JSON has no {value}")
        return float(value)
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise problem(place, f"the key {shown(key)} is no string")
            found[str(key)] = _copied(item, (*place, str(key)), left)
        return found
    if isinstance(value, list | tuple):
        return [_copied(item, (*place, n), left) for n, item in enumerate(value)]
    raise problem(place, f"JSON has no form for {shown(value)}")


def _no_number(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _normal(value: Any) -> Any:
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
