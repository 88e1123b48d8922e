"""Values that JSON has a form for, as they travel: to an engine and back from it alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import msgspec

from mlx_engine.checks import shown

PLAIN = (str, int, float, bool, type(None))

_HUGE = 1  # the number of the extension for integers that msgpack has no form for
_MOST, _LEAST = 2**64 - 1, -(2**63)  # of those that it has one for
_DEEPEST = 400  # lists and mappings within each other; the other side has to open them, too


def to_wire(value: Any, *, lenient: bool = False) -> Any:
    """A value in types that msgpack has; what arrives is equal, but tuples are lists.

    Args:
        lenient: whether what has no form, a type that JSON does not know or text that no UTF-8
            has, may arrive spelled out.

    Raises:
        ValueError: something in it cannot travel; the text says what, in words.
    """
    return _to_wire(value, lenient, 0)


def extension_from_wire(code: int, data: memoryview) -> int:
    """The integer in an extension.

    Raises:
        ValueError: it is another one.
    """
    if code != _HUGE:
        raise ValueError(f"there is no extension {code}")
    return int.from_bytes(data, "big", signed=True)


def encodable(value: Any) -> Any:
    """A string without what no UTF-8 has, and anything else as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def simple(value: Any) -> Any:
    """A number or string of a derived type, NumPy's among them, as one of Python's own."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, str):
        return str(value)
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _to_wire(value: Any, lenient: bool, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} lists and mappings within each other")
    if isinstance(value, Mapping):
        return {
            _key(key, lenient): _to_wire(item, lenient, depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_to_wire(item, lenient, depth + 1) for item in value]
    value = simple(value)
    if isinstance(value, int) and not _LEAST <= value <= _MOST:
        return _huge(value)
    if isinstance(value, PLAIN):
        return encodable(value) if lenient else value
    if not lenient:
        raise ValueError(f"a value of the type {type(value).__name__}")
    return encodable(repr(value))


def _key(key: Any, lenient: bool) -> Any:
    key = encodable(simple(key)) if lenient else simple(key)
    if not isinstance(key, PLAIN) or (isinstance(key, int) and not _LEAST <= key <= _MOST):
        raise ValueError(f"the key {shown(key)}")
    return key


def _huge(value: int) -> msgspec.msgpack.Ext:
    if abs(value) >= 10 ** sys.get_int_max_str_digits() > 1:
        raise ValueError(shown(value))  # nobody could write it into a prompt
    return msgspec.msgpack.Ext(
        _HUGE, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    )
