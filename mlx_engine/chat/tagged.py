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
    if form.reasoning is not None:
        yield from _reasoning(parts, form.reasoning, prefix)
    sections = tuple(map(section, form.calls)) if parts.has_tools else ()
    yield from _content(parts, sections, form.drop)


def _reasoning(parts: AnswerParts, form: ReasoningFormat, prefix: str) -> Steps[None]:
    source = parts.source
    place = prefix.rfind(form.open) if form.open else -1
    is_open = place >= 0 and form.close not in prefix[place:]
    parts.in_reasoning = is_open
    if is_open or form.close not in prefix:
        found = yield from source.read(compiled(rf"(\s{{0,256}}){regex.escape(form.open)}"))
        if found is None and not is_open:
            return
        parts.in_reasoning = True
        if found is not None:
            parts.reasoning(found[1])
        found = yield from source.find(*_end_of_reasoning(form.close, parts))
        if found is not None:
            source.at = found.end()
            parts.in_reasoning = False


def _end_of_reasoning(close: str, parts: AnswerParts) -> tuple[Pattern, object, Pattern]:
    """Where reasoning ends: at its marker, unless that stands between backticks."""
    marker = regex.escape(close)
    return (
        compiled(rf"(?<!`){marker}|{marker}(?=[^`])"),
        parts.reasoning,
        compiled(rf"(?<!`){marker}|{marker}(?!`)"),
    )


@lru_cache(maxsize=128)
def _markers(sections: tuple[Section, ...], drop: tuple[str, ...]) -> Pattern | None:
    """What may end a run of content: a group for each section, and one for what is dropped."""
    every = [rf"(?P<s{index}>{each.opening})" for index, each in enumerate(sections)
             if each.bare is None]  # fmt: skip
    if drop:
        every.append(rf"(?P<drop>{'|'.join(map(regex.escape, drop))})")
    return compiled("|".join(every)) if every else None


def _content(
    parts: AnswerParts, sections: tuple[Section, ...], drop: tuple[str, ...]
) -> Steps[None]:
    source = parts.source
    for each in sections:
        if each.bare is not None:
            yield from _bare(parts, each)
    markers = _markers(sections, drop)
    if markers is None:
        markers = compiled(r"(?!)")
    while True:
        found = yield from source.find(markers, parts.content)
        if found is None:
            return
        if parts.quoting:
            parts.content(source.text[source.at])
            source.at += 1
        elif found.lastgroup == "drop":
            source.at = found.end()
        else:
            each = sections[int(found.lastgroup[1:])]
            yield from source.read(each.marker)
            yield from read_section(source, parts.calls, each)


def _bare(parts: AnswerParts, each: Section) -> Steps[None]:
    """Calls without a marker, if the content begins with one of a tool that there is."""
    found = yield from parts.source.look(each.bare)
    if found is not None and found["tool"] in parts.calls.tools:
        yield from read_section(parts.source, parts.calls, each)
