"""Numbers and paths that callers give: of which kind, in which range, and the error that says so.

Whatever is given, what is raised is ``InvalidRequest``, and its text is short.
"""

from __future__ import annotations

import math
import os
from decimal import Decimal
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TypeGuard, TypeVar

from mlx_engine.errors import InvalidRequest

T = TypeVar("T")

LARGEST = 2**63 - 1  # what an integer may be that native code or another process gets

_CHARACTERS, _ITEMS, _DEPTH = 100, 5, 4  # of a value that an error shows


def shown(value: object) -> str:
    """``repr`` of anything, short: a giant number has none, nor has what is nested deep."""
    try:
        return _shown(value, _DEPTH)
    except Exception:  # noqa: BLE001 - a caller's class may do anything in its __repr__
        return f"an object of type {type(value).__name__}"


def integer(
    option: str,
    value: object,
    *,
    low: int,
    high: int = LARGEST,
    what: str = "an integer",
    also: str | None = None,
) -> int:
    """``value`` as an ``int`` in [low, high].

    Args:
        option: what the error calls it.
        what: what it is, for the error.
        also: what else might have been given, for the error.

    Raises:
        InvalidRequest: it is no integer, or out of that range.
    """
    found = None
    if _is_integer(value):
        found = int(value)
        if low <= found <= high:
            return found
    told = high != LARGEST or (found is not None and found > high)
    span = f"from {low} to {high}" if told else f"{low} or more"
    raise InvalidRequest(option, f"must be {what}, {span}{_or(also)}, not {shown(value)}")


def integer_or_none(option: str, value: object, *, low: int, high: int = LARGEST) -> int | None:
    """``value`` as ``integer`` has it, or ``None``."""
    return None if value is None else integer(option, value, low=low, high=high, also="None")


def number(
    option: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    endless: bool = False,
    what: str = "a number",
    also: str | None = None,
) -> float:
    """``value`` as a ``float`` in [low, high], or in (low, high] with ``above``.

    Args:
        option: what the error calls it.
        endless: whether it may be infinite.
        what: what it is, for the error: ``"seconds"``.
        also: what else might have been given, for the error.

    Raises:
        InvalidRequest: it is no real number, no float can hold it, or it is out of that range.
    """
    found = _as_float(value)
    ok = found is not None and (low < found <= high or (found == low and not above))
    if found is not None and ok and (endless or math.isfinite(found)):
        return found
    raise InvalidRequest(
        option, f"must be {what}, {_span(low, high, above)}{_or(also)}, not {shown(value)}"
    )


def number_or_none(
    option: str,
    value: object,
    *,
    low: float = -math.inf,
    above: bool = False,
    endless: bool = False,
    what: str = "a number",
) -> float | None:
    """``value`` as ``number`` has it, or ``None``."""
    if value is None:
        return None
    return number(option, value, low=low, above=above, endless=endless, what=what, also="None")


def choice(option: str, value: object, choices: tuple[T, ...]) -> T:
    """The one of ``choices`` that ``value`` is equal to; neither a bool nor 4.0 is an integer.

    Raises:
        InvalidRequest: there is none.
    """
    for one in choices:
        try:
            same = not isinstance(one, int) or _is_integer(value)
            if same and one == value:
                return one
        except Exception:  # noqa: BLE001 - an array, say, that is compared item by item
            continue
    raise InvalidRequest(option, f"must be one of {choices}, not {shown(value)}")


def flag(option: str, value: object) -> bool:
    """``value``, if it is a bool.

    Raises:
        InvalidRequest: it is not.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(option, f"must be True or False, not {shown(value)}")
    return value


def _is_integer(value: object) -> TypeGuard[Integral]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        found = float(value)
        return None if math.isinf(found) and value != found else found  # Decimal("1e400")
    except (
        ArithmeticError,
        TypeError,
        ValueError,
    ):  # 10**400, and what a Decimal calls a signalling NaN
        return None


def _span(low: float, high: float, above: bool) -> str:
    if low == -math.inf:
        return "of any finite value"
    if high == math.inf:
        return f"above {low:g}" if above else f"{low:g} or more"
    return f"above {low:g}, up to {high:g}" if above else f"from {low:g} to {high:g}"


def _or(also: str | None) -> str:
    return "" if also is None else f", or {also}"


def _shown(value: object, depth: int) -> str:
    match value:
        case int() if abs(value) >= 10**_CHARACTERS:
            return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
        case str() | bytes() | bytearray():
            return repr(value[:_CHARACTERS]) + ("..." if len(value) > _CHARACTERS else "")
        case list() | tuple() | dict() if not depth and value:
            return "..."
        case dict():
            pairs = islice(value.items(), _ITEMS)
            items = [f"{_shown(key, depth - 1)}: {_shown(item, depth - 1)}" for key, item in pairs]
            return "{" + _listed(items, len(value)) + "}"
        case list():
            items = [_shown(item, depth - 1) for item in value[:_ITEMS]]
            return f"[{_listed(items, len(value))}]"
        case tuple():
            items = [_shown(item, depth - 1) for item in value[:_ITEMS]]
            return f"({_listed(items, len(value))}{',' if len(value) == 1 else ''})"
    text = repr(value)
    return text if len(text) <= 2 * _CHARACTERS else f"{text[:_CHARACTERS]}..."


def _listed(items: list[str], count: int) -> str:
    return ", ".join([*items, "..."] if count > len(items) else items)


def checked_path(path: str | os.PathLike[str]) -> Path:
    """``path``, if it can be one; raises ``InvalidRequest`` if not."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InvalidRequest("path", f"must be the path of a file, not {shown(path)}")
    if "\0" in str(path):
        raise InvalidRequest("path", f"must not have a NUL character in it: {shown(path)}")
    return Path(path).expanduser()
