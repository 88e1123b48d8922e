"""Tool calls of a script, cut into tokens as a model would write them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mlx_engine.outputs import ToolCall, ToolCallDelta
from mlx_engine.testing.fake_tokens import words


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A token of a call.

    Attributes:
        text: of the token.
        delta: what the token adds to the call.
        call: the call, if it is complete with that.
    """

    text: str
    delta: ToolCallDelta
    call: ToolCall | None = None


def raw_call(name: str, arguments: dict[str, object]) -> str:
    """A call as the model of a ``FakeEngine`` writes it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def pieces_of(call: ToolCall, index: int) -> list[CallPiece]:
    """The tokens of a call: its name comes first, then its arguments, piece by piece.

    Args:
        index: of the call in the answer.
    """
    if call.ok:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        head, found, tail = call.raw.partition(arguments)
        given = words(arguments)
        texts = [head, *(given if found else [""] * len(given))]
        texts[-1] += tail
        deltas = [ToolCallDelta(index, arguments=each) for each in given]
    else:
        texts = words(call.raw) or [""]
        deltas = [ToolCallDelta(index) for _ in texts[1:]]
    named = ToolCallDelta(index, call.id, call.name or None)
    pieces = list(map(CallPiece, texts, [named, *deltas]))
    delta = pieces[-1].delta
    last = ToolCallDelta(index, delta.id, delta.name, delta.arguments, call.error)
    return [*pieces[:-1], CallPiece(texts[-1], last, call)]
