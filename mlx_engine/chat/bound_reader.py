"""Answers that a grammar binds: the first of each marker counts, whatever is around it."""

from __future__ import annotations

from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.bound_answer import GAP, LONGEST_GAP, BoundAnswer
from mlx_engine.chat.call_section import read_section, section
from mlx_engine.chat.call_syntax import compiled, literally
from mlx_engine.chat.source import Emit, Steps


def read(parts: AnswerParts, bound: BoundAnswer) -> Steps[None]:
    """Read a whole answer."""
    source = parts.source
    had_some = yield from _reasoning(parts, bound)
    parts.in_reasoning, parts.reasoning_over = False, True
    yield from _gap(parts, bound.gaps[0 if had_some else 1])
    if bound.begun:
        yield from source.peek()
        source.put_back(bound.begun)
    if bound.openings and (yield from source.read(_any_of(bound.openings))):
        yield from _content(parts, bound, calls=False)
    elif bound.calls is None:
        yield from _all(parts, parts.content)
    elif bound.heads and bound.is_free and (yield from source.look(_any_of(bound.heads))) is None:
        yield from _content(parts, bound, calls=False)
    else:
        if not bound.trigger:
            yield from read_section(source, parts.calls, section(bound.calls))
        yield from _content(parts, bound, calls=bool(bound.trigger))


def _reasoning(parts: AnswerParts, bound: BoundAnswer) -> Steps[bool]:
    """Read the reasoning, and tell whether there was any."""
    source, form = parts.source, bound.reasoning
    if form is None:
        return False
    parts.in_reasoning = had_some = bound.in_reasoning
    opening = form.open.rstrip("\n")
    close = compiled(literally(form.close))
    while True:
        if not parts.in_reasoning:
            if not opening or (yield from source.read(compiled(literally(opening)))) is None:
                return had_some
            parts.in_reasoning = had_some = True
            if opening != form.open and (yield from source.peek()) == "\n":
                source.at += 1
        found = yield from source.find(close, parts.reasoning)
        if found is None:
            return True
        source.at = found.end()
        parts.in_reasoning = False
        yield from _literal(parts, bound.turn)
        if not bound.repeats:
            return True


def _gap(parts: AnswerParts, gap: str) -> Steps[None]:
    if gap != GAP:
        yield from _literal(parts, gap)
        return
    for _ in range(LONGEST_GAP):
        char = yield from parts.source.peek()
        if char == "" or char not in " \t\r\n":
            return
        parts.source.at += 1


def _literal(parts: AnswerParts, text: str) -> Steps[None]:
    if text:
        yield from parts.source.read(compiled(literally(text)))


def _content(parts: AnswerParts, bound: BoundAnswer, *, calls: bool) -> Steps[None]:
    """Read the rest, with calls in it or without."""
    source = parts.source
    every = [f"(?P<call>{literally(bound.trigger)})"] if calls else []
    every += [f"(?P<drop>{'|'.join(map(literally, bound.drop))})"] if bound.drop else []
    markers = compiled("|".join(every) or r"(?!)")
    while (found := (yield from source.find(markers, parts.content))) is not None:
        if found.lastgroup == "drop":
            source.at = found.end()
            continue
        assert bound.calls is not None
        each = section(bound.calls)
        yield from source.read(each.marker)
        yield from read_section(source, parts.calls, each, single=bound.is_free)


def _all(parts: AnswerParts, emit: Emit) -> Steps[None]:
    yield from parts.source.find(compiled(r"(?!)"), emit)


def _any_of(texts: tuple[str, ...]) -> object:
    return compiled("|".join(map(literally, texts)))
