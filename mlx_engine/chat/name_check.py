"""Names of tools and arguments that a family's format can write so that they are read again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mlx_engine.chat import bound_reader
from mlx_engine.chat.answer_format import ToolFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.bound_answer import BoundAnswer
from mlx_engine.chat.frames import Frame
from mlx_engine.chat.tool_schemas import OfferedTool, names_of
from mlx_engine.errors import InvalidRequest

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # what every format takes


def check_names(frame: Frame, reads: ToolFormat, tools: Sequence[OfferedTool]) -> None:
    """Look at the names that are not plain.

    Raises:
        InvalidRequest: one of them cannot be written in this format.
    """
    for tool in tools:
        keys = () if frame.arguments == "json" else tuple(names_of(tool))
        if not _PLAIN.fullmatch(tool.name) and not _is_read(frame, reads, tool.name, ()):
            place = tool.place.removesuffix("parameters") + "name"
            raise InvalidRequest(
                place, f"{tool.name!r:.80} cannot be written in this model's format"
            )
        for key in keys:
            if not _PLAIN.fullmatch(key) and not _is_read(frame, reads, "f", (key,)):
                raise tool.refused(f"argument {key!r:.80} cannot be written in this model's format")


@lru_cache(maxsize=1024)
def _is_read(frame: Frame, reads: ToolFormat, name: str, keys: tuple[str, ...]) -> bool:
    """Whether a call with these names is read as it was written."""
    parts = AnswerParts({name: {}}, literal=True)
    bound = BoundAnswer(calls=reads, trigger=frame.marker)
    steps = bound_reader.read(parts, bound)
    next(steps, None)
    parts.source.add(_written(frame, name, keys))
    parts.source.ended = True
    next(steps, None)
    read = [(call.name, list(call.arguments), call.ok) for call in parts.calls.done]
    return read == [(name, list(keys), True)]


def _written(frame: Frame, name: str, keys: Sequence[str]) -> str:
    """A call in which every argument is 1."""
    if frame.arguments == "python":
        arguments = ", ".join(f"{key}=1" for key in keys)
    elif frame.arguments == "tags":
        each = frame.argument.replace("IS_TEXT", "false"), frame.end
        arguments = "".join("1".join(text.replace("KEY", key) for text in each) for key in keys)
    else:
        arguments = "{" + ",".join(f"{key}:1" for key in keys) + "}"
    head = frame.head.replace("INDEX", "0").replace("NAME", name)
    text = frame.marker + frame.open + head + arguments + frame.tail + frame.close
    return text.replace("\n?", "")
