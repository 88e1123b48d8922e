"""The decoder of a fast tokenizer, taken apart into steps that stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders

from mlx_engine.models.decode_stages import (
    ByteFallback,
    ByteLevel,
    EachItem,
    Replace,
    Stage,
    StripStart,
    WordEnd,
)

MakeStage = Callable[[], Stage]


class TokenStrings:
    """The first step of a fast tokenizer: the string of each token, if it has one."""

    def __init__(self, backend: Tokenizer) -> None:
        self._string = backend.id_to_token

    def feed(self, token: int) -> list[str]:
        """The string of a token; nothing for an id that the tokenizer does not have."""
        string = self._string(token)
        return [] if string is None else [string]

    def finish(self) -> list[str]:
        """Nothing: none is held."""
        return []


def stages_of(backend: Tokenizer) -> list[MakeStage] | None:
    """Makers of the steps of its decoder; ``None`` if one of them is not known to stream."""
    if backend.decoder is None:
        return [partial(EachItem, _joined_by_spaces)]
    try:
        config = json.loads(backend.decoder.__getstate__())
        return _Steps().of(config)
    except Exception:  # noqa: BLE001 - the border: a decoder of the user's own cannot be read
        return None


class _NotKnown(Exception):
    """A step that needs more of the text than a part."""


class _Steps:
    def __init__(self) -> None:
        self._made: list[MakeStage] = []
        self._joined = False  # the strings are parts of one by now

    def of(self, config: dict[str, Any]) -> list[MakeStage]:
        """The steps of a decoder as ``tokenizers`` writes it."""
        self._add(config)
        return self._made

    def _add(self, step: dict[str, Any]) -> None:
        match step["type"]:
            case "Sequence":
                for part in step["decoders"]:
                    self._add(part)
            case "Fuse":
                self._joined = True
            case _ if self._joined:
                self._made.append(_on_a_text(step))
            case "ByteLevel":
                self._made.append(partial(ByteLevel, {}))
                self._joined = True
            case "ByteFallback":
                self._made.append(ByteFallback)
            case "BPEDecoder":
                self._made.append(partial(WordEnd, step["suffix"]))
            case "Replace" | "Strip" | "Metaspace" | "WordPiece":
                # Behind ByteFallback any string can come: nothing is remembered of those.
                remember = ByteFallback not in self._made
                self._made.append(partial(EachItem, _by_itself(step, remember=remember)))
            case _:
                raise _NotKnown


def _on_a_text(step: dict[str, Any]) -> MakeStage:
    match step:
        case {"type": "Strip", "content": content, "start": start, "stop": 0}:
            return partial(StripStart, content, start)
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return partial(Replace, pattern, content)
    raise _NotKnown


def _by_itself(step: dict[str, Any], *, remember: bool) -> Callable[[str, bool], str]:
    """The text that ``tokenizers`` itself makes of one string."""
    if step["type"] == "Strip" and step["stop"]:
        raise _NotKnown  # tokenizers 0.23 panics at strings that are shorter
    decoder = decoders.Fuse()
    decoder.__setstate__(json.dumps(step).encode())
    if decoder.decode([""]):
        raise _NotKnown
    known: dict[str, str] = {}

    def convert(string: str, first: bool) -> str:
        if first:
            return decoder.decode([string])
        text = known.get(string)
        if text is None:
            text = decoder.decode(["", string])
            if remember:
                known[string] = text
        return text

    return convert


def _joined_by_spaces(string: str, first: bool) -> str:
    return string if first else " " + string
