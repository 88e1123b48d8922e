"""Answers that are text with markers in it: reasoning first, then content with calls."""

from __future__ import annotations

from functools import lru_cache

import regex

from mlx_engine.chat.answer_format import AnswerFormat, ReasoningFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.bodies import compiled
from mlx_engine.chat.section import Section, read_section, section
from mlx_engine.chat.source import Pattern, Steps


def read(parts: AnswerParts, form: AnswerFormat, prefix: str) -> Steps[None]:
    """Read a whole answer."""
    stray = None
    if form.reasoning is not None:
        had_some = yield from _reasoning(parts, form.reasoning, prefix)
        stray = None if had_some else form.reasoning.close
    parts.reasoning_over = True
    sections = tuple(map(section, form.calls)) if parts.has_tools else ()
    yield from _content(parts, sections, form.drop, stray)


def _reasoning(parts: AnswerParts, form: ReasoningFormat, prefix: str) -> Steps[bool]:
    """Read the reasoning at the beginning of an answer, and tell whether there was any."""
    source = parts.source
    opened, closed = prefix.find(form.open), prefix.rfind(form.close)
    parts.in_reasoning = opened >= 0 and closed < opened
    if not parts.in_reasoning and closed >= 0:
        return False
    opening = compiled(rf"(\s{{0,256}}){regex.escape(form.open)}")
    found = yield from source.read(opening)  # some open it once more
    if found is not None:
        parts.reasoning(found[1])
    elif not parts.in_reasoning:
        return False
    parts.in_reasoning = True
    marker = regex.escape(form.close)  # unless it stands between backticks
    found = yield from source.find(
        compiled(rf"(?<!`){marker}|{marker}(?=[^`])"),
        parts.reasoning,
        compiled(rf"(?<!`){marker}|{marker}(?!`)"),
    )
    if found is not None:
        source.at = found.end()
        parts.in_reasoning = False
    return True


@lru_cache(maxsize=128)
def _markers(
    sections: tuple[Section, ...], drop: tuple[str, ...], stray: str | None, ended: bool
) -> Pattern:
    """Markers that may end a run of content: a group a section, and one for what is dropped."""
    every = [
        rf"(?P<s{index}>{each.opening})" for index, each in enumerate(sections) if each.bare is None
    ]
    if drop:
        every.append(rf"(?P<drop>{'|'.join(map(regex.escape, drop))})")
    if stray:  # alone on its line
        line = r"(?<![^\n])" + regex.escape(stray)
        behind = r"\n|\Z" if ended else r"\n"
        every.append(rf"(?P<stray>{line}(?=[ \t]{{0,64}}(?:{behind})))")
    return compiled("|".join(every) or r"(?!)")


def _content(
    parts: AnswerParts, sections: tuple[Section, ...], drop: tuple[str, ...], stray: str | None
) -> Steps[None]:
    source = parts.source
    if stray and (
        found := (yield from source.read(compiled(rf"(\s{{0,256}}){regex.escape(stray)}")))
    ):
        parts.content(found[1])
        stray = None
    for each in sections:
        if each.bare is not None:
            yield from _bare(parts, each)
    while True:
        found = yield from source.find(
            _markers(sections, drop, stray, False),
            parts.content,
            _markers(sections, drop, stray, True),
        )
        if found is None:
            return
        if parts.quoting:
            parts.content(source.text[source.at])
            source.at += 1
        elif found.lastgroup in ("drop", "stray"):
            source.at = found.end()
            stray = None if found.lastgroup == "stray" else stray
        else:
            each = sections[int(found.lastgroup[1:])]
            yield from source.read(each.marker)
            yield from read_section(source, parts.calls, each)


def _bare(parts: AnswerParts, each: Section) -> Steps[None]:
    """Calls without a marker, if the content begins with one of a tool that there is."""
    found = yield from parts.source.look(each.bare)
    if found is not None and found["tool"] in parts.calls.tools:
        yield from read_section(parts.source, parts.calls, each)
