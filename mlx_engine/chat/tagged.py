"""Answers that are text with markers in it: reasoning first, then content with calls."""

from __future__ import annotations

from functools import lru_cache

import regex

from mlx_engine.chat.answer_format import AnswerFormat, ReasoningFormat
from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.call_section import Section, read_section, section
from mlx_engine.chat.call_syntax import compiled
from mlx_engine.chat.source import Pattern, Steps
from mlx_engine.chat.unclosed import ends_with_calls

_MOST_TRIALS = 8  # places in reasoning that are looked at for calls


def read(parts: AnswerParts, form: AnswerFormat, prefix: str) -> Steps[None]:
    """Read a whole answer."""
    stray = None
    sections = tuple(
        section(each)
        for each in form.calls
        if parts.has_tools
        and (not each.only_with or any(name in parts.calls.tools for name in each.only_with))
    )
    if form.reasoning is not None:
        had_some = yield from _reasoning(parts, form.reasoning, prefix, sections)
        stray = None if had_some else form.reasoning.close
    parts.reasoning_over = True
    yield from _begun(parts, form, prefix, _markers(sections, form.drop, None, False))
    yield from _content(parts, sections, form.drop, stray)


def _begun(parts: AnswerParts, form: AnswerFormat, prefix: str, markers: Pattern) -> Steps[None]:
    """Read a marker whose beginning is the end of the prompt, as if the model had written all."""
    source = parts.source
    begun = next((each.open for each in form.calls if each.open and prefix.endswith(each.open)), "")
    if not begun:
        return
    yield from source.peek()
    source.put_back(begun)
    if (yield from source.look(markers)) is None:
        source.at += len(begun)


def _reasoning(
    parts: AnswerParts, form: ReasoningFormat, prefix: str, sections: tuple[Section, ...]
) -> Steps[bool]:
    """Read the reasoning at the beginning of an answer, and tell whether there was any."""
    source = parts.source
    opening = form.open.rstrip("\n")
    opened, closed = prefix.find(opening), prefix.rfind(form.close)
    parts.in_reasoning = opened >= 0 and closed < opened
    if not parts.in_reasoning and closed >= 0:
        return False
    # Some open it once more.
    found = yield from source.read(compiled(rf"(\s{{0,256}}){regex.escape(opening)}"))
    if found is not None:
        parts.reasoning(found[1])
        if opening != form.open and (yield from source.peek()) == "\n":
            source.at += 1
    elif not parts.in_reasoning:
        return False
    parts.in_reasoning = True
    trials = 0
    while True:
        looked = sections if trials < _MOST_TRIALS else ()
        found = yield from source.find(
            _closing(form, looked, False), parts.reasoning, _closing(form, looked, True)
        )
        if found is None:
            break
        if found.lastgroup in ("close", "other"):
            source.at = found.end() if found.lastgroup == "close" else source.at
            parts.in_reasoning = False
            break
        trials += 1
        if (yield from ends_with_calls(parts, sections[int(found.lastgroup[1:])])):
            parts.in_reasoning = False
            break
    return True


@lru_cache(maxsize=128)
def _closing(form: ReasoningFormat, sections: tuple[Section, ...], ended: bool) -> Pattern:
    """The ends that reasoning may have: its marker, not between backticks, and calls."""
    marker, behind = regex.escape(form.close), "(?!`)" if ended else "(?=[^`])"
    every = [rf"(?P<close>(?<!`){marker}|{marker}{behind})"]
    if form.others:
        every.append(rf"(?P<other>{'|'.join(map(regex.escape, form.others))})")
    return compiled("|".join(every + _openings(sections)))


def _openings(sections: tuple[Section, ...]) -> list[str]:
    """The beginnings of calls that have markers, a group a section."""
    return [
        rf"(?P<s{index}>{each.opening})" for index, each in enumerate(sections) if each.bare is None
    ]


@lru_cache(maxsize=128)
def _markers(
    sections: tuple[Section, ...], drop: tuple[str, ...], stray: str | None, ended: bool
) -> Pattern:
    """Markers that may end a run of content: a group a section, and one for what is dropped."""
    every = _openings(sections)
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
