"""Keywords of JSON Schema that have no schemas in them."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.grammars.formats import FORMATS, FREE, OF_INTEGERS
from mlx_engine.grammars.json_values import check_number, check_text, check_writable, same
from mlx_engine.grammars.keywords import TYPES
from mlx_engine.grammars.pattern import MOST_DEMANDED, demanded, from_ecma, unsupported
from mlx_engine.grammars.problem import Place, problem

MOST_VALUES = 8_192  # of one enum
MOST_COMPOSED = 1_000  # of them, lists and objects
MOST_ITEMS = 4_096
LONGEST_PATTERN = 4_096
LARGEST_DIVISOR = 1_000  # of a multiple, without the point


def _type(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in TYPES:
            raise problem(here, f"must be of {', '.join(TYPES)}, not {shown(name)}")
    if not names:
        raise problem(here, "must not be empty: nothing has no type")
    out["type"] = names[0] if len(names) == 1 else list(dict.fromkeys(names))


def _enum(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    if not isinstance(value, list) or not value:
        raise problem(here, f"must be a list of values that is not empty, not {shown(value)}")
    if len(value) > MOST_VALUES:
        raise problem(here, f"has {len(value)} values; {MOST_VALUES} are the most")
    if sum(isinstance(each, list | dict) for each in value) > MOST_COMPOSED:
        raise problem(here, f"has more than {MOST_COMPOSED} lists and objects in it")
    check_writable(here, value)
    out["enum"] = [*{same(each): each for each in value}.values()]


def _const(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    check_writable(here, value)
    out["const"] = value


def _required(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise problem(here, f"must be a list of strings, not {shown(value)}")
    for number, key in enumerate(value):
        check_text((*here, number), key)
    out["required"] = list(dict.fromkeys(value))


def _count(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise problem(here, f"must be an integer, 0 or more, not {shown(value)}")
    most = {"minItems": MOST_ITEMS, "maxItems": MOST_ITEMS}.get(str(here[-1]), 10**6)
    if value > most:
        raise problem(here, f"must be at most {most} to be enforced, not {shown(value)}")
    out[str(here[-1])] = value


def _bound(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    keyword, number = str(here[-1]), check_number(here, value)
    if keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        keyword, number = _inclusive(keyword, number)
    if keyword in out and "inimum" in keyword:
        number = max(number, out[keyword])
    elif keyword in out:
        number = min(number, out[keyword])
    out[keyword] = number


def _inclusive(keyword: str, number: int | float) -> tuple[str, int | float]:
    """A bound that excludes an integer, as one that it does not reach.

    llguidance 1.9 takes 2 for a number above 2 and up to 2.5.
    """
    digits = 15 - len(str(abs(number)))
    if isinstance(number, float) or digits < 1:
        return keyword, number
    step = Decimal(1).scaleb(-min(digits, 9))
    if keyword == "exclusiveMinimum":
        return "minimum", float(Decimal(number) + step)
    return "maximum", float(Decimal(number) - step)


def _multiple(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    number = check_number(here, value)
    digits = repr(number).replace(".", "").strip("0")
    if number <= 0 or int(digits or 0) > LARGEST_DIVISOR or number > LARGEST_DIVISOR:
        raise problem(
            here,
            f"must be above 0, and no more than {LARGEST_DIVISOR} without the point, to be "
            f"enforced: not {shown(value)}",
        )
    out["multipleOf"] = number


def _pattern(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    _match(out, checked_pattern(value, here))


def _format(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    if not isinstance(value, str):
        raise problem(here, f"must be a string, not {shown(value)}")
    given = schema.get("type", "string")
    types = given if isinstance(given, list) else [given]
    if value in OF_INTEGERS and "integer" in types:
        low, high = OF_INTEGERS[value]
        out.setdefault("allOf", []).append({"minimum": low, "maximum": high})
    elif "string" in types and value in FORMATS:
        _match(out, f"^(?:{FORMATS[value]})$")
    elif "string" in types and value not in FREE:
        raise problem(here, f"{shown(value)} cannot be enforced; {', '.join(sorted(FORMATS))} can")


def _unique(out: dict[str, Any], value: Any, here: Place, schema: Any) -> None:
    if not isinstance(value, bool):
        raise problem(here, f"must be true or false, not {shown(value)}")
    if value and schema.get("maxItems", 2) not in (0, 1):
        raise problem(here, "cannot be enforced; leave it out, and drop what comes twice")


def _match(out: dict[str, Any], pattern: str) -> None:
    if "pattern" in out:
        out.setdefault("allOf", []).append({"pattern": pattern})
    else:
        out["pattern"] = pattern


def checked_pattern(value: Any, here: Place, *, wide: bool = False) -> str:
    """A regular expression of a schema, for the compiler.

    Args:
        wide: see ``from_ecma``.

    Raises:
        InvalidRequest: it is none, or none that is enforced.
    """
    if not isinstance(value, str):
        raise problem(here, f"must be a regular expression, not {shown(value)}")
    if len(value) > LONGEST_PATTERN:
        raise problem(here, f"has {len(value)} characters; {LONGEST_PATTERN} are the most")
    if (found := unsupported(value)) is not None:
        raise problem(here, f"{found} in {shown(value)} cannot be enforced")
    if demanded(value) > MOST_DEMANDED:
        raise problem(here, f"demands text of more than {MOST_DEMANDED} characters")
    return from_ecma(value, wide=wide)


PLAIN: dict[str, Callable[[dict[str, Any], Any, Place, Any], None]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "required": _required,
    "uniqueItems": _unique,
    "pattern": _pattern,
    "format": _format,
    "multipleOf": _multiple,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _count
    ),
}
