"""Values that callers give: of which kind, in which range, and the error that says so.

Whatever is given, what is raised is ``InvalidRequest``, and its text is short.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, get_type_hints

from mlx_engine.errors import InvalidRequest
from mlx_engine.other_names import NAMES, advice

T = TypeVar("T")

LARGEST = 2**63 - 1  # what an integer may be that native code or another process gets

_CHARACTERS, _ITEMS, _DEPTH = 100, 5, 4  # of a value that an error shows
_LONGEST = 64  # characters of an unknown option to look at
_NEAR = 0.75  # likeness of two names of which one may be a slip of the other
_SHORTEST = 5  # characters: shorter names are like too many


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a dataclass, as far as its type and default do not say it.

    Attributes:
        check: called with the field's name and what was given; returns the value to keep, or
            raises ``InvalidRequest``.
        help: a line for the command.
    """

    check: Callable[[str, Any], object]
    help: str


def option(check: Callable[..., object], help: str = "", **limits: object) -> Option:
    """The annotation of a field: ``Annotated[int, option(integer, "tokens", low=1)]``."""
    return Option(partial(check, **limits), help)


_OPTIONS: dict[type[object], dict[str, Option]] = {}  # of the classes that were asked for


def options_of(kind: type[object]) -> dict[str, Option]:
    """The fields of a dataclass that are annotated with an ``Option``."""
    if (found := _OPTIONS.get(kind)) is None:
        hints = get_type_hints(kind, include_extras=True)
        found = _OPTIONS[kind] = {
            name: extra
            for name, hint in hints.items()
            for extra in getattr(hint, "__metadata__", ())
            if isinstance(extra, Option)
        }
    return found


def check_options(config: object) -> None:
    """Check those fields of a frozen dataclass, in its ``__post_init__``.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """
    for name, option in options_of(type(config)).items():
        object.__setattr__(config, name, option.check(name, getattr(config, name)))


def unknown_option(name: str, known: Iterable[str], of: str = "") -> InvalidRequest:
    """The error for an option that does not exist, with what to write instead: what is known by
    that name elsewhere, or else by the nearest name of all.
    """
    known, name = list(known), name[:_LONGEST]
    hint = advice(name, known)
    if hint is None:
        others = NAMES if len(name) >= _SHORTEST else ()
        near = difflib.get_close_matches(name.lower(), {*known, *others}, n=1, cutoff=_NEAR)
        if near:
            hint = f"did you mean {near[0]!r}?" if near[0] in known else advice(near[0], known)
    hint = hint or f"known are {', '.join(known)}"
    return InvalidRequest(name, f"there is no such option{of}; {hint}")


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


def integer_or_auto(
    option: str, value: object, *, low: int, high: int = LARGEST
) -> int | Literal["auto"] | None:
    """``value`` as ``integer_or_none`` has it, or ``"auto"``."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value  # type: ignore[return-value]
    return integer(option, value, low=low, high=high, also="'auto' or None")


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
    high: float = math.inf,
    above: bool = False,
    endless: bool = False,
    what: str = "a number",
) -> float | None:
    """``value`` as ``number`` has it, or ``None``."""
    if value is None:
        return None
    return number(
        option, value, low=low, high=high, above=above, endless=endless, what=what, also="None"
    )


def checked_time_limit(timeout: float | None) -> float | None:
    """``timeout`` of a request, if it can be one; raises ``InvalidRequest`` if not."""
    return number_or_none(
        "timeout", timeout, low=0, above=True, endless=True, what="seconds of work"
    )


def checked_wait(max_wait: float | None) -> float | None:
    """``max_wait`` of a request, if it can be one; raises ``InvalidRequest`` if not."""
    return number_or_none("max_wait", max_wait, low=0, endless=True, what="seconds")


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


# More digits mean no memory, and some hundreds of them no number of which there are bytes.
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt])(i?)b?", re.IGNORECASE)


def size_of(text: str) -> int | None:
    """Bytes that a text such as 8GB, 512 MiB or 1.5g means; ``None`` if it means none."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    amount, unit, binary = found.groups()
    return int(float(amount) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def path_text(path: Any) -> Any:
    """``path`` as a string; what is no path is left for others to refuse."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def text_or_none(option: str, value: object) -> str | None:
    """``value``, if it is a string or ``None``.

    Raises:
        InvalidRequest: it is not.
    """
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(option, f"must be a string or None, not {shown(value)}")
    return value


def path_or_none(option: str, value: object) -> str | None:
    """``value`` as ``text_or_none`` has it; it may be a path."""
    return text_or_none(option, path_text(value))


def checked_path(path: str | os.PathLike[str]) -> Path:
    """``path``, if it can be one; raises ``InvalidRequest`` if not."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InvalidRequest("path", f"must be the path of a file, not {shown(path)}")
    if "\0" in str(path):
        raise InvalidRequest("path", f"must not have a NUL character in it: {shown(path)}")
    return Path(path).expanduser()
