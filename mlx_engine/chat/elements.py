"""Lists and objects that are written as elements, one in the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.argument_types import argument_schema, cast, item_schema, types_of
from mlx_engine.chat.call_syntax import compiled, literally
from mlx_engine.chat.calls import Calls
from mlx_engine.chat.json_text import DEEPEST, quoted
from mlx_engine.chat.source import CutOff, Malformed, Source, Steps

_ITEM = "item"


def elements(
    source: Source, calls: Calls, mark: str, schema: Mapping[str, Any], depth: int = 1
) -> Steps[bool]:
    """Read a value that is written as elements, if it is, and add its JSON text.

    Args:
        source: the text.
        calls: gets it.
        mark: what each tag begins with.
        schema: of the value.
        depth: of the value in others.

    Raises:
        Malformed: it does not go on so.
    """
    opening = compiled(r"\s{0,64}" + literally(mark) + r"<(?P<key>[^<>/\s][^<>\n]{0,255})>")
    if (found := (yield from source.look(opening))) is None:
        return (yield from _empty(source, calls, mark, schema))
    if depth > DEEPEST:
        raise Malformed(f"the arguments are nested deeper than {DEEPEST} levels")
    types = types_of(schema, calls.schema)
    is_list = found["key"] == _ITEM and ("array" in types or "object" not in types)
    root = calls.schema
    separator = "[" if is_list else "{"
    while (found := (yield from source.read(opening))) is not None:
        key = found["key"]
        if is_list and key != _ITEM:
            raise Malformed(f"<{key}> stands between the items of a list")
        calls.add(separator if is_list else f"{separator}{quoted(key)}: ")
        separator = ", "
        inner = item_schema(schema, root) if is_list else argument_schema(key, schema, root)
        yield from _element(source, calls, mark, key, inner, depth)
        yield from source.skip_space()
    calls.add("]" if is_list else "}")
    return True


def _element(
    source: Source, calls: Calls, mark: str, key: str, schema: Mapping[str, Any], depth: int
) -> Steps[None]:
    close = compiled(literally(f"{mark}</{key}>"))
    types = types_of(schema, calls.schema)
    if "string" not in types and (yield from elements(source, calls, mark, schema, depth + 1)):
        yield from source.skip_space()
        yield from source.expect(close, f"</{key}>")
        return
    parts: list[str] = []
    if (found := (yield from source.find(close, parts.append))) is None:
        raise CutOff
    source.at = found.end()
    calls.add(cast("".join(parts), types))


def _empty(source: Source, calls: Calls, mark: str, schema: Mapping[str, Any]) -> Steps[bool]:
    """Whether it is a list or an object that has nothing in it."""
    types = types_of(schema, calls.schema)
    if "string" in types or types.isdisjoint(("array", "object")):
        return False
    if (yield from source.look(compiled(r"\s{0,64}" + literally(f"{mark}</")))) is None:
        return False
    calls.add("[]" if "array" in types else "{}")
    return True
