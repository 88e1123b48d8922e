"""Calls whose arguments stand between tags of their own."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mlx_engine.chat.argument_types import argument_schema, cast, types_of
from mlx_engine.chat.call_syntax import compiled, literally, without_names
from mlx_engine.chat.calls import Calls
from mlx_engine.chat.elements import elements
from mlx_engine.chat.json_text import escaped, json_value, quoted
from mlx_engine.chat.source import CutOff, Malformed, Match, Pattern, Source, Steps

_KEY = r"(?P<key>[^<>\n\"]{1,256})"
_CDATA = compiled(r"<!\[CDATA\[")


@dataclass(frozen=True, slots=True)
class TaggedCall:
    """A head with the name, and each argument between tags of its own.

    Attributes:
        head: a pattern with the group ``name``.
        argument: a pattern of what is before a value, with ``{key}`` for the argument's name, and
            perhaps a group ``type``.
        close: what is behind a value; ``{key}`` is the argument's name.
        end: what a call ends with.
        tail: a pattern of what may stand behind that.
        start: a pattern of what a call begins with; without one, the head.
        after: patterns of what may follow a call whose end is missing.
        newlines: a newline before a value is none of it, nor is one behind it then.
        string_types: what the group ``type`` may be for a string.
        cdata: a value may be written as a section of character data.
        entities: names of tools and arguments are written with XML's entities.
        element: what the tags of lists and objects in a value begin with, if they have tags.
    """

    head: str
    argument: str
    close: str
    end: str = ""
    tail: str = ""
    start: str = ""
    after: tuple[str, ...] = ()
    newlines: bool = False
    is_marked: bool = False
    string_types: tuple[str, ...] = ("string", "true")
    cdata: bool = False
    entities: bool = False
    element: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.start or self.head)

    @property
    def resume(self) -> str:
        """A pattern of where reading goes on after a malformed call."""
        return literally(self.end)

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened."""
        found = yield from source.expect(compiled(self.head), "a name")
        calls.begin(self._name(found["name"]))
        argument = compiled(self.argument.replace("{key}", _KEY))
        separator = "{"
        while True:
            char = yield from source.skip_space()
            found = yield from source.read(argument)
            if found is None:
                break
            calls.add(separator + quoted(self._name(found["key"])) + ": ")
            separator = ", "
            yield from self._value(source, calls, found)
        calls.add("}" if separator == ", " else "{}")
        if self.end and not (yield from source.read(compiled(literally(self.end)))):
            after = compiled("|".join(self.after) or r"(?!)")
            if char == "" or (yield from source.look(after)) is None:
                source.fail("an argument or the end of the call")
        if self.tail:
            yield from source.skip_space()
            yield from source.read(compiled(self.tail))
        calls.complete()

    def _name(self, written: str) -> str:
        name = written.strip().strip("\"'")
        return html.unescape(name) if self.entities else name

    def _value(self, source: Source, calls: Calls, head: Match) -> Steps[None]:
        schema = argument_schema(self._name(head["key"]), calls.schema, calls.schema)
        types = types_of(schema, calls.schema)
        told = head.groupdict().get("type")
        if told in self.string_types and (not types or "string" in types):
            types = frozenset({"string"})
        stripped = self.newlines and (yield from source.peek()) == "\n"
        source.at += stripped
        if calls.literal:
            end = compiled(literally("\n" * stripped + self.close.replace("{key}", head["key"])))
            told_other = not types and told is not None
            yield from self._bound(source, calls, types, end, head["key"], told_other)
            return
        has_elements = self.element and "string" not in types
        if has_elements and (yield from elements(source, calls, self.element, schema)):
            yield from source.skip_space()
            close = literally(self.close.replace("{key}", head["key"]))
            yield from source.expect(compiled(close), "the end of a value")
            return
        if self.cdata and (yield from source.read(_CDATA)):
            end = compiled(literally("]]>") + r"\s{0,64}" + literally(self.close))
            ends = end, end
        else:
            key = head["key"] if "{key}" in self.close else ""
            before, last = (_value_end(self, key, stripped, ended) for ended in (False, True))
            ends = before, last
        yield from self._text(source, calls, types, ends, head["key"])

    def _bound(
        self,
        source: Source,
        calls: Calls,
        types: frozenset[str],
        end: Pattern,
        key: str,
        told_other: bool,
    ) -> Steps[None]:
        """Read a value that a grammar binds: lists and objects as JSON, the rest up to the end."""
        kind = {"{": "object", "[": "array"}.get((yield from source.peek()))
        if kind is not None and (told_other or kind in types):
            yield from json_value(source, calls.add)
            yield from source.expect(end, "the end of a value")
        else:
            yield from self._text(source, calls, types, (end, end), key)

    def _is_quoted(self, end: Match, calls: Calls) -> bool:
        """Whether what looks like the next argument is none of the tool's, and so of the value."""
        key = end.groupdict().get("next")
        known = calls.schema.get("properties")
        if key is None or not isinstance(known, Mapping) or not known:
            return False
        return self._name(key) not in known

    def _text(
        self,
        source: Source,
        calls: Calls,
        types: frozenset[str],
        ends: tuple[Pattern, Pattern],
        key: str,
    ) -> Steps[None]:
        """Read a value that is written as text, up to where it ends."""
        parts: list[str] = []
        is_text = types == {"string"}
        if is_text:
            calls.add('"')
        emit = (lambda text: calls.add(escaped(text))) if is_text else parts.append
        found = yield from source.find(ends[0], emit, ends[1])
        while found is not None and self._is_quoted(found, calls):
            emit(source.text[source.at])
            source.at += 1
            found = yield from source.find(ends[0], emit, ends[1])
        if found is None:
            raise CutOff
        source.at = found.end()
        try:
            calls.add('"' if is_text else cast("".join(parts), types))
        except Malformed as error:
            calls.wrong(f"argument {key!r}: {error}")
            calls.add("null")


@lru_cache(maxsize=512)
def _value_end(body: TaggedCall, key: str, stripped: bool, ended: bool) -> Pattern:
    """Where a value ends: a tag counts if what may be behind it is.

    Its group ``next`` is the name of the next argument, if the tag itself is missing.

    Args:
        body: how the call is written.
        key: the argument's name, as it is written, if the tag has it.
        stripped: a newline behind the value is none of it.
        ended: no more text will come.
    """
    newline = r"\n?" if stripped else ""
    follow = [body.argument.replace("{key}", _KEY), *body.after]
    if body.end:
        follow.append(literally(body.end))
    behind = "|".join(map(without_names, follow))
    close = newline + literally(body.close.replace("{key}", key))
    each = [rf"{close}(?=\s{{0,256}}(?:{behind}))"]
    if ended:
        each.append(rf"{close}(?=\s*\Z)")
    if body.newlines:  # the tag itself is missing
        argument = without_names(body.argument).replace("{key}", _KEY.replace("key", "next"))
        each.append(rf"\n(?=\s{{0,64}}(?:{argument}))")
        if body.end and body.after:
            each.append(rf"\n(?={literally(body.end)}\s{{0,64}}(?:{'|'.join(body.after)}))")
    return compiled("|".join(each))
