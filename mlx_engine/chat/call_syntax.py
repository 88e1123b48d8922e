"""How one call is written: each body reads a call from its name to its end."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import regex

from mlx_engine.chat.calls import Calls
from mlx_engine.chat.json_text import TextSource, escaped, json_string, json_value, parse, quoted
from mlx_engine.chat.literal import PYTHON, Dialect, literal
from mlx_engine.chat.source import Emit, Malformed, Pattern, Source, Steps


class Body(Protocol):
    """One call, as a family writes it.

    Attributes:
        start: a pattern of what a call begins with.
        resume: a pattern of where reading goes on after a malformed call; empty if nothing shows.
        is_marked: a call shows by its beginning, without a marker of a section before it.
    """

    @property
    def start(self) -> str: ...  # noqa: D102

    @property
    def resume(self) -> str: ...  # noqa: D102

    @property
    def is_marked(self) -> bool: ...  # noqa: D102

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened.

        Raises:
            Malformed: it does not go on like one.
        """


@lru_cache(maxsize=512)
def compiled(pattern: str) -> Pattern:
    """A pattern, compiled once."""
    return regex.compile(pattern, regex.DOTALL)


def literally(text: str) -> str:
    """A pattern of just this text."""
    return str(regex.escape(text))


_COLON = r"\s{0,64}:"
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_IDS = ("id", "tool_call_id")


@dataclass(frozen=True, slots=True)
class JSONCall:
    """``{"name": "f", "arguments": {...}}``, with the keys in any order.

    Attributes:
        late_id: the model's id may come behind the arguments, which wait for it.
        none: names by which a model says that it calls nothing.
    """

    late_id: bool = False
    none: tuple[str, ...] = ()
    start: str = r'\{\s{0,64}"'
    resume: str = (
        r'\}\s{0,64},?\s{0,64}(?=\{\s{0,64}"(?:name|function|tool_name|type|tool_call_id)")'
    )
    is_marked: bool = False

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened."""
        state = _Parts(calls, self.late_id)
        yield from _members(source, state)
        state.end()
        if state.name in self.none and state.name not in calls.tools:
            calls.drop()
        else:
            calls.complete()


class _Parts:
    """The name, id and arguments of a call, in the order in which they come."""

    def __init__(self, calls: Calls, late_id: bool) -> None:
        self._calls = calls
        self._late = late_id
        self._held: list[str] = []
        self.name: str | None = None
        self.id: str | None = None

    def named(self) -> None:
        if self.name is not None and not self._late:
            self._begin()

    def add(self, text: str) -> None:
        if self._calls.has_name:
            self._calls.add(text)
        else:
            self._held.append(text)

    def end(self) -> None:
        if self.name is not None and not self._calls.has_name:
            self._begin()

    def _begin(self) -> None:
        self._calls.begin(self.name or "", self.id)
        for text in self._held:
            self._calls.add(text)
        self._held.clear()


def _members(source: Source, parts: _Parts) -> Steps[None]:
    """The members of the object that is a call, or that has one as its function."""
    source.at += 1
    first = True
    while (yield from source.skip_space()) != "}":
        if not first:
            yield from source.expect(compiled(r",\s{0,256}"), "','")
        first = False
        if (yield from source.skip_space()) != '"':
            source.fail("a key")
        key = yield from _text(source)
        yield from source.expect(compiled(_COLON), "':'")
        char = yield from source.skip_space()
        if key == "function" and char == "{":
            yield from _members(source, parts)
        elif key in _NAMES and char == '"':
            if parts.name is not None:
                raise Malformed("the call has two names")
            parts.name = yield from _text(source)
            parts.named()
        elif key in _IDS and char == '"':
            parts.id = yield from _text(source)
        elif key in _ARGUMENTS:
            yield from _arguments(source, parts)
        else:
            yield from json_value(source, _nothing)
    source.at += 1


def _arguments(source: Source, parts: _Parts) -> Steps[None]:
    if (yield from source.skip_space()) == '"':  # an object as a text
        yield from _value_in_text(source, parts.add)
    else:
        yield from json_value(source, parts.add)


def _nothing(text: str) -> None:
    pass


def _text(source: Source) -> Steps[str]:
    chunks: list[str] = []
    yield from json_string(source, chunks.append)
    value = parse("".join(chunks))
    return value if isinstance(value, str) else ""


def _value_in_text(source: Source, emit: Emit) -> Steps[None]:
    """Read JSON that was written as a text, and emit it as it comes.

    What is none is emitted as it is, so that it is told later, as of others.
    """
    emit("")  # an empty one, too, is none
    text = TextSource(emit)
    yield from json_string(source, text.add)
    text.end()


@dataclass(frozen=True, slots=True)
class HeadedCall:
    """A head with the name, and the arguments behind it: ``name[ARGS]{...}``.

    Attributes:
        head: a pattern with a group ``name`` and perhaps ``id``; ``wrong``, if it matches,
            makes an error of the call.
        start: a pattern of what a call begins with; without one, the head.
        tail: a pattern of what may follow the arguments.
        end: the last marker of a call.
        entities: the name is written with XML's entities.
        dialect: in which the arguments are written; ``None`` is JSON.
    """

    head: str
    start: str = ""
    tail: str = ""
    end: str = ""
    is_marked: bool = False
    entities: bool = False
    dialect: Dialect | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.start or self.head)

    @property
    def resume(self) -> str:
        """A pattern of where reading goes on after a malformed call."""
        return literally(self.end)

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened."""
        found = yield from source.expect(compiled(self.head), "a name")
        groups = found.groupdict()
        name = groups["name"].strip()
        calls.begin(html.unescape(name) if self.entities else name, groups.get("id"))
        if groups.get("wrong"):
            calls.wrong(f"{groups['wrong']!r} does not belong to a name")
        char = yield from source.skip_space()
        if char == "{" and self.dialect is None:
            yield from json_value(source, calls.add)
        elif char == "{" and self.dialect is not None:
            yield from literal(source, calls.add, self.dialect)
        elif char == '"' and self.dialect is None:
            yield from _value_in_text(source, calls.add)
        else:
            source.fail("an object of arguments")
        if self.tail:
            yield from source.skip_space()
            yield from source.read(compiled(self.tail))
        if self.end:
            yield from source.skip_space()
            yield from source.read(compiled(literally(self.end)))
        calls.complete()


def without_names(pattern: str) -> str:
    """The pattern with its groups unnamed, so that it can stand twice in another."""
    return str(regex.sub(r"\(\?P<\w+>", "(?:", pattern))


@dataclass(frozen=True, slots=True)
class PythonCall:
    """``name(key="value", other=1)``."""

    start: str = r"[A-Za-z_][\w.\-]{0,127}\("
    resume: str = r"\)(?:\s{0,64},|[ \t]{0,64}\n)\s{0,64}(?=[A-Za-z_][\w.\-]{0,127}\()"
    is_marked: bool = False

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened."""
        found = yield from source.expect(compiled(self.start), "a name")
        name = found.group()[:-1]
        calls.begin(name if name in calls.tools else name.removesuffix(".call"))
        separator = "{"
        while (yield from source.skip_space()) != ")":
            if separator == ", ":
                yield from source.expect(compiled(r",\s{0,256}"), "','")
                if (yield from source.skip_space()) == ")":
                    break
            key = yield from source.expect(
                compiled(r"(?P<key>[^\W\d][\w\-]{0,255})\s{0,16}="), "an argument's name"
            )
            calls.add(separator + quoted(key["key"]) + ": ")
            separator = ", "
            yield from literal(source, calls.add, PYTHON)
        source.at += 1
        calls.add("}" if separator == ", " else "{}")
        calls.complete()


# What runs code, by the names that requests give it.
RUNS_CODE = ("python", "code_interpreter", "ipython")


@dataclass(frozen=True, slots=True)
class CodeCall:
    """Code for the tool that runs it, up to a marker or the end of the answer.

    Attributes:
        end: a pattern of what the code ends before.
    """

    end: str = r"(?!)"
    start: str = r"(?=[^\s{\[<>])"  # no code begins with the others
    resume: str = ""
    is_marked: bool = False

    def read(self, source: Source, calls: Calls) -> Steps[None]:
        """Read a call that was opened; what calls another tool as a function is no code."""
        function = PythonCall()
        found = yield from source.look(compiled(function.start))
        if found is not None and found.group()[:-1].removesuffix(".call") in calls.tools:
            yield from function.read(source, calls)
            return
        calls.begin(next((name for name in RUNS_CODE if name in calls.tools), ""))
        yield from code_argument(source, calls, compiled(self.end))
        calls.complete()


def code_argument(source: Source, calls: Calls, end: Pattern) -> Steps[None]:
    """Read code up to its end, as the argument of the tool that runs it."""
    known = calls.schema.get("properties")
    keys = tuple(known) if isinstance(known, Mapping) else ()
    key = "code" if "code" in keys or not keys else str(keys[0])
    calls.add(f'{{{quoted(key)}: "')
    yield from source.find(end, lambda text: calls.add(escaped(text)))
    calls.add('"}')


_KIND = r'"type"\s{0,16}:\s{0,16}"function"\s{0,16},\s{0,64}'
_NAME = r'"(?:name|function)"\s{0,16}:\s{0,16}"(?P<tool>[^"\\]{1,256})"'

# Calls that no marker tells from text; the group ``tool`` is what tells.
BARE_JSON = JSONCall(start=rf"\{{\s{{0,64}}(?:{_KIND})?{_NAME}")
BARE_PYTHON = PythonCall(start=r"(?P<tool>[A-Za-z_][\w.\-]{0,127})\(")
