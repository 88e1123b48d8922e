"""Calls between their markers: where they begin in a text, and one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import regex

from mlx_engine.chat.answer_format import ToolFormat
from mlx_engine.chat.call_syntax import Body, PythonCall, compiled, without_names
from mlx_engine.chat.calls import Calls
from mlx_engine.chat.source import CutOff, Malformed, Pattern, Source, Steps

_MOST_CUT_OFFS = 8  # calls that are read up to the end of an answer, in vain


# Some put their calls into a block of code between the markers.
_FENCE = r"```(?:json|python|tool_code|xml)?"


@dataclass(frozen=True, slots=True)
class Section:
    """A tool format, compiled.

    Attributes:
        opening: a pattern of where its calls begin, without named groups.
        marker: what is read of that.
        close: what ends it, or ``None``.
        bodies: each with the pattern of what a call begins with.
        recovery: where reading goes on after a call that is malformed.
        bare: for calls without a marker, a pattern with the name of the first.
    """

    opening: str
    marker: Pattern
    close: Pattern | None
    bodies: tuple[tuple[Pattern, Body], ...]
    recovery: Pattern
    bare: Pattern | None


@lru_cache(maxsize=64)
def section(form: ToolFormat) -> Section:
    """The compiled form of a tool format."""
    bodies = form.bodies
    starts = "|".join(without_names(body.start) for body in bodies)
    if form.may_be_empty and form.close:
        starts += "|" + regex.escape(form.close)
    opening = rf"(?=\s{{0,256}}(?:{_FENCE}\s{{0,64}})?(?:\[\s{{0,64}})?(?:{starts}))"
    marked = [without_names(body.start) for body in bodies if body.is_marked]
    stops = [text for text in (form.open, form.close) if text]
    ends = [body.resume for body in bodies if body.resume]
    every = [regex.escape(form.open) + opening] if form.open else []
    if marked:
        every.append(f"(?=(?:{'|'.join(marked)}))")
    recovery = [rf"(?P<end>{'|'.join(ends)})"] if ends else []
    recovery += [regex.escape(text) for text in stops] + marked
    return Section(
        opening="|".join(every) if every else opening,
        marker=compiled(regex.escape(form.open)),
        close=compiled(regex.escape(form.close)) if form.close else None,
        bodies=tuple((compiled(body.start), body) for body in bodies),
        recovery=compiled("|".join(recovery) if recovery else r"(?!)"),
        bare=None if form.open or marked else compiled(_bare(bodies)),
    )


def _bare(bodies: tuple[Body, ...]) -> str:
    starts = "|".join(body.start for body in bodies)
    bracket = (
        r"\[\s{0,64}" if all(isinstance(body, PythonCall) for body in bodies) else r"\[?\s{0,64}"
    )
    return rf"\s{{0,256}}{bracket}(?:{starts})"


def read_section(
    source: Source, calls: Calls, section: Section, *, single: bool = False
) -> Steps[None]:
    """Read the calls of a section, whose opening marker was read.

    Args:
        single: without brackets and an end of the section there is one call, whatever follows.
    """
    depth = count = 0
    yield from source.skip_space()
    fence = yield from source.read(compiled(rf"{_FENCE}(?=\s)"))
    while True:
        char = yield from source.skip_space()
        if section.close and (yield from source.read(section.close)):
            break
        body = yield from _next_body(source, section)
        if body is not None:
            count += 1
            calls.open()
            yield from _one(source, calls, section, body)
            if single and not depth and section.close is None:
                break
        elif char == "[" and not count and not depth:
            source.at += 1
            depth = 1
        elif char == "]" and depth:
            source.at += 1
            depth = 0
            if section.close is None:
                break
        elif fence and count and (yield from source.read(compiled("```"))):
            fence = None
        elif char in (",", ";") and count and (depth or char == ";" or section.close):
            source.at += 1
        elif char and section.close and calls.is_open:
            yield from source.find(section.recovery, _nothing)
            calls.settle("text follows the call")
        else:
            break
    if fence:
        yield from source.skip_space()
        yield from source.read(compiled("```"))
    calls.settle()
    if count:
        yield from source.skip_space()


def _one(source: Source, calls: Calls, section: Section, body: Body) -> Steps[None]:
    """Read a call; one that is malformed ends where the next or the section's end is."""
    try:
        yield from body.read(source, calls)
    except Malformed as error:
        calls.cut_offs += isinstance(error, CutOff)
        if calls.cut_offs > _MOST_CUT_OFFS:
            source.at = len(source.text)
        else:
            source.rewind()
            source.at += 1  # what it begins with is no end of it
            found = yield from source.find(section.recovery, _nothing)
            if found is not None and found.lastgroup == "end":
                source.at = found.end()
        calls.settle(str(error))


def _next_body(source: Source, section: Section) -> Steps[Body | None]:
    for pattern, body in section.bodies:
        if (yield from source.look(pattern)) is not None:
            return body
    return None


def _nothing(text: str) -> None:
    pass
