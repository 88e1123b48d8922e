"""The calls of one answer, as they are made: deltas for streams, and whole calls at their end."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from typing import Any

from mlx_engine.chat.json_text import parse
from mlx_engine.chat.source import Malformed, Source
from mlx_engine.core.stream import Piece
from mlx_engine.outputs import ToolCall, ToolCallDelta

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9
_LONGEST_NAME = 256

NOT_AN_OBJECT = "the arguments are no object"


def new_id() -> str:
    """Nine letters and digits, which every family's template takes."""
    number, characters = secrets.randbelow(len(_ID_CHARACTERS) ** _ID_LENGTH), list[str]()
    for _ in range(_ID_LENGTH):
        number, rest = divmod(number, len(_ID_CHARACTERS))
        characters.append(_ID_CHARACTERS[rest])
    return "".join(characters)


class Calls:
    """Calls that are being written.

    A syntax calls ``open``, ``begin`` with the name, ``add`` with the arguments piece by piece,
    and ``complete``; whether that was right is settled when it is seen what follows.

    Args:
        source: the text that they are written in.
        tools: the schemas of the arguments, by the tools' names.
        pieces: gets the deltas.
        parallel: whether more than one may be made.
        literal: the first of each marker counts, since a grammar binds the answer.
    """

    def __init__(
        self,
        source: Source,
        tools: Mapping[str, Mapping[str, Any]],
        pieces: list[Piece],
        *,
        parallel: bool = True,
        literal: bool = False,
    ) -> None:
        self.tools = tools
        self.literal = literal
        self.done: list[ToolCall] = []
        self.is_open = False
        self.cut_offs = 0  # calls that were read up to the end of the answer, in vain
        self._source = source
        self._pieces = pieces
        self._parallel = parallel
        self._ids: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self._name = self._id = ""
        self._error: str | None = None
        self._begun = False
        self._value: dict[str, Any] = {}
        self._raw: str | None = None  # once the call is complete
        self._arguments: list[str] = []
        self._fresh: list[str] = []

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the open call's arguments; empty if its tool is not known."""
        return self.tools.get(self._name, {})

    @property
    def has_name(self) -> bool:
        """Whether the open call has begun."""
        return bool(self._name)

    def open(self, raw: str | None = None) -> None:
        """Begin a call here in the text; the one before it is right.

        Args:
            raw: all of the call's text, if that is read already.
        """
        self.settle()
        self.is_open = True
        self._source.record(raw or "")

    def begin(self, name: str, id: str | None = None) -> None:
        """Give the call's name, and the model's own id if it has one."""
        if self._name:
            raise Malformed("the call has two names")
        self._name = name[:_LONGEST_NAME]
        self._id = id if id and id not in self._ids else ""
        if name not in self.tools:
            self._error = f"there is no tool {name[:_LONGEST_NAME]!r}"
        elif not self._parallel and any(call.ok for call in self.done):
            self._error = "parallel calls are switched off"
        else:
            self._give(name=name)

    def add(self, text: str) -> None:
        """Add the next piece of the arguments' JSON text."""
        self._arguments.append(text)
        self._fresh.append(text)

    def wrong(self, error: str) -> None:
        """Tell of an error with which the text can be read on."""
        self._error = self._error or error

    def complete(self) -> None:
        """The call has all that it needs; what follows may still spoil it."""
        if not self._arguments:
            self.add("{}")
        if self._error is None:
            self._value, self._error = self._parsed()
        if self._error is None:
            self._give()
        self._raw = self._source.so_far()

    def drop(self) -> None:
        """Forget the open call, which is none; of an unknown tool, so that nothing was given."""
        self.is_open = False
        self._source.stop_recording()
        self._clear()

    def flush(self) -> None:
        """Give out what was added since the last time."""
        if self._begun and self._fresh and self._error is None:
            self._give()

    def settle(self, error: str | None = None) -> None:
        """End the open call, if there is one."""
        if not self.is_open:
            return
        self.is_open = False
        if error is None and self._raw is None:
            error = "the call was cut off"
        raw = self._raw if error is None and self._raw is not None else self._source.so_far()
        error = self._error or error
        if error is not None:
            self._fresh.clear()
            self._give(error=error)
        self._source.stop_recording()
        value = {} if error is not None else self._value
        self.done.append(ToolCall(self._name, value, raw, error, self._id))
        self._clear()

    def _parsed(self) -> tuple[dict[str, Any], str | None]:
        if not self._name:
            return {}, "the call has no name"
        try:
            value = parse("".join(self._arguments))
        except Malformed as malformed:
            return {}, str(malformed)
        return (value, None) if isinstance(value, dict) else ({}, NOT_AN_OBJECT)

    def _give(self, name: str | None = None, error: str | None = None) -> None:
        text, arguments = self._source.fresh(), "".join(self._fresh)
        self._fresh.clear()
        if self._begun and not arguments and error is None:
            if text:  # the rest of what the model wrote, which adds nothing
                self._pieces.append(Piece("tool_call", text, ToolCallDelta(len(self.done))))
            return
        given = None
        if not self._begun:
            self._begun = True
            self._id = given = self._id or new_id()
            self._ids.add(given)
            name = name or self._name
        delta = ToolCallDelta(len(self.done), given, name, arguments, error)
        self._pieces.append(Piece("tool_call", text, delta))
