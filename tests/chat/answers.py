"""Answers for the parser: fed in any cut, and what came of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_engine.chat.formats import AnswerFormat
from mlx_engine.chat.parser import AnswerParser
from mlx_engine.core.stream import Piece
from mlx_engine.outputs import ToolCall


@dataclass(frozen=True)
class Answer:
    content: str
    reasoning: str
    text: str  # both, in the order in which they came
    calls: tuple[ToolCall, ...]
    streamed: tuple[tuple[Any, ...], ...]  # the calls, as their deltas tell


def tool(name: str, **properties: object) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def parse(
    form: AnswerFormat,
    text: str | Iterable[str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    prefix: str = "",
    **options: Any,
) -> Answer:
    parser = AnswerParser(form, tools, prefix, **options)
    pieces: list[Piece] = []
    for part in [text] if isinstance(text, str) else text:
        pieces += parser.feed(part)
    pieces += parser.finish()
    answer = Answer(
        "".join(piece.text for piece in pieces if piece.segment == "content"),
        "".join(piece.text for piece in pieces if piece.segment == "reasoning"),
        "".join(piece.text for piece in pieces if piece.segment != "tool_call"),
        parser.calls,
        _streamed(pieces),
    )
    check(answer, pieces)
    return answer


def _streamed(pieces: Iterable[Piece]) -> tuple[tuple[Any, ...], ...]:
    calls: dict[int, list[Any]] = {}
    for piece in pieces:
        if (delta := piece.call) is None:
            continue
        if delta.index not in calls:
            assert delta.id
            calls[delta.index] = [delta.id, delta.name, "", None]
        else:
            assert delta.id is delta.name is None
        call = calls[delta.index]
        assert call[3] is None, "an error comes last"
        call[2] += delta.arguments
        call[3] = delta.error
    assert list(calls) == list(range(len(calls)))
    return tuple(tuple(call) for call in calls.values())


def check(answer: Answer, pieces: Sequence[Piece]) -> None:
    """Deltas, joined, are the calls, and their texts are what the model wrote."""
    assert len(answer.calls) == len(answer.streamed)
    for call, (id, name, arguments, error) in zip(answer.calls, answer.streamed, strict=True):
        assert (call.id, call.name, call.error) == (id, name, error)
        if call.ok:
            assert json.loads(arguments, parse_constant=_no_constant) == call.arguments
            json.dumps(call.arguments, allow_nan=False).encode()
        else:
            assert call.arguments == {}
    assert len({call.id for call in answer.calls}) == len(answer.calls)
    assert all(piece.text or piece.call for piece in pieces), "a piece has something"
    for piece in pieces:
        assert (piece.segment == "tool_call") == (piece.call is not None)


def _no_constant(name: str) -> None:
    raise AssertionError(name)


def cuts(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def random_cuts(text: str, seed: int) -> list[str]:
    chance, parts, at = random.Random(seed), [], 0
    while at < len(text):
        length = chance.choice((1, 1, 2, 3, 5, 8, 13, 40))
        parts.append(text[at : at + length])
        at += length
    return parts


def told(answer: Answer) -> tuple[Any, ...]:
    """An answer without its ids, which are made anew each time."""
    calls = [(call.name, call.arguments, call.raw, call.error) for call in answer.calls]
    return answer.content, answer.reasoning, calls
