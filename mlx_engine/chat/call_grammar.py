"""The grammar of calls, in the frame of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_engine.chat.answer_format import ToolFormat
from mlx_engine.chat.call_syntax import HeadedCall
from mlx_engine.chat.frames import Frame
from mlx_engine.chat.lark import Lark
from mlx_engine.chat.literal import PYTHON
from mlx_engine.chat.literal_grammar import LiteralGrammar
from mlx_engine.chat.tagged_call import TaggedCall
from mlx_engine.chat.tagged_grammar import tagged_value
from mlx_engine.chat.tool_schemas import OfferedTool, names_of, properties_of


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """The writer of the rules for calls.

    Attributes:
        lark: gets them.
        frame: how the family writes calls.
        reads: how they are read.
        bound: whether the arguments of tools that are not strict follow their schemas too.
    """

    lark: Lark
    frame: Frame
    reads: ToolFormat
    bound: bool = True

    def behind(self, marker: str, tools: Sequence[OfferedTool], *, many: bool) -> str:
        """A rule for calls, behind what was read of their marker.

        Args:
            marker: that; it may go on with the beginning of the first call's head.
        """
        lark, frame = self.lark, self.frame
        # In one piece, since a text that is free begins alike.
        first = self._call(tools, frame.open, marker.removeprefix(frame.marker))
        more = ""
        if many and frame.between is not None:
            more = f"({lark.template(frame.between)} {self._call(tools)})*"
        return lark.rule(f"{first} {more} {lark.template(frame.close)}")

    def _call(self, tools: Sequence[OfferedTool], before: str = "", begun: str = "") -> str:
        lark, frame = self.lark, self.frame
        head = before + frame.head.removeprefix(begun)
        return lark.any_of(
            [
                lark.rule(
                    f"{lark.template(head, NAME=tool.name)} {self._arguments(tool)} "
                    f"{lark.template(frame.tail)}"
                )
                for tool in tools
            ]
        )

    def _arguments(self, tool: OfferedTool) -> str:
        free = not self.bound and not tool.strict
        if self.frame.arguments == "json":
            return self.lark.rule(tool.json_rule({"type": "object"} if free else tool.schema))
        if self.frame.arguments == "gemma":
            schema = {"type": "object"} if free else tool.schema
            return self._literal(tool).rule(schema)
        write = self._tag if self.frame.arguments == "tags" else self._keywords(tool)
        separator = "/, ?/" if self.frame.arguments == "python" else ""
        if free:
            return self._any_of([write(tool, key, {}) for key in names_of(tool)], separator)
        items = [(write(tool, key, schema), must) for key, schema, must in properties_of(tool)]
        return self.lark.members(items, separator)

    def _literal(self, tool: OfferedTool) -> LiteralGrammar:
        dialects = [body.dialect for body in self.reads.bodies if isinstance(body, HeadedCall)]
        return LiteralGrammar(self.lark, tool, next(filter(None, dialects), PYTHON))

    def _keywords(self, tool: OfferedTool) -> Callable[[OfferedTool, str, Mapping[str, Any]], str]:
        values = self._literal(tool)
        return lambda tool, key, schema: self.lark.rule(
            f"{self.lark.literal(f'{key}=')} {values.rule(schema)}"
        )

    def _any_of(self, items: list[str], separator: str) -> str:
        """Any of these, in any order."""
        if not items:
            return '""'
        each = self.lark.any_of(items)
        return self.lark.rule(f"({each} ({separator} {each})*)?")

    def _tag(self, tool: OfferedTool, key: str, schema: Mapping[str, Any]) -> str:
        body = next(body for body in self.reads.bodies if isinstance(body, TaggedCall))
        newline = "\n" if body.newlines else ""
        close = newline + body.close.replace("{key}", key)
        behind = self.frame.end.replace("KEY", key).removeprefix(close)
        before = self.frame.argument
        value = tagged_value(self.lark, tool, schema, close, told="IS_TEXT" in before)
        text, other = (self.lark.template(before, KEY=key, IS_TEXT=told) for told in _TOLD)
        choices = [f"{text} {each}" for each in value.texts]
        choices += [f"{other} {each} {self.lark.literal(close)}" for each in value.others]
        return self.lark.rule(f"{self.lark.any_of(choices)} {self.lark.template(behind)}")


_TOLD = ("true", "false")
