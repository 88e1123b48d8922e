"""The decoder of a fast tokenizer, taken apart into steps that stream."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol, Self

from tokenizers import Tokenizer, decoders, pre_tokenizers

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class Stage(Protocol):
    """A step of a decoder; a copy of it goes on from the same place."""

    def feed(self, items: list[str]) -> list[str]:
        """Take the next strings; give what is certain now."""

    def finish(self) -> list[str]:
        """The string that is still held, since nothing more comes."""


class EachItem:
    """A step that makes of each string another one, by itself, but may treat the first apart.

    Args:
        convert: gives a string's text; its second argument tells whether it is the first.
    """

    def __init__(self, convert: Callable[[str, bool], str]) -> None:
        self._convert = convert
        self._first = True

    def feed(self, items: list[str]) -> list[str]:
        """Strings, converted."""
        converted = []
        for item in items:
            converted.append(self._convert(item, self._first))
            self._first = False
        return converted

    def finish(self) -> list[str]:
        """Nothing: none is held."""
        return []


class ByteLevel:
    """Strings whose characters stand for bytes; joins them and decodes UTF-8.

    Bytes that are no text become replacement characters at once; at most three are held, which
    may be the beginning of a character.
    """

    def __init__(self, known: dict[str, bytes]) -> None:
        self._known = known  # of this tokenizer, filled as strings come
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, items: list[str]) -> list[str]:
        """The characters that are complete."""
        data = b""
        for item in items:
            found = self._known.get(item)
            if found is None:
                found = self._known[item] = _bytes_of(item)
            data += found
        text = self._decoder.decode(data)
        return [text] if text else []

    def finish(self) -> list[str]:
        """A replacement character for a character that has only begun."""
        return [self._decoder.decode(b"", final=True)]

    def __copy__(self) -> Self:
        other = type(self)(self._known)
        other._decoder.setstate(self._decoder.getstate())
        return other


class ByteFallback:
    """Strings such as ``<0x0A>`` are bytes; runs of them become text, all other strings stay.

    A run that is no UTF-8 becomes one replacement character a byte, *all* of it: its last byte
    can still change its first character. So a run is held to its end, or until it is broken.

    Attributes:
        held: the characters of the run so far, if it ends well; grows, or is another list.
    """

    def __init__(self) -> None:
        self.held: list[str] = []
        self._count = 0  # bytes in the run
        self._broken = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, items: list[str]) -> list[str]:
        """The strings that are no bytes, and the runs that end, or are broken."""
        given: list[str] = []
        for item in items:
            match = _BYTE_TOKEN.fullmatch(item) if item[:3] == "<0x" else None
            if match is None:
                given += self.finish() if self._count else ()
                given.append(item)
            else:
                given += self._take(int(match[1], 16))
        return given

    def finish(self) -> list[str]:
        """The run that is open."""
        given: list[str] = []
        if self._count and not self._broken:
            try:
                self._decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                given = [REPLACEMENT] * self._count
            else:
                given = ["".join(self.held)]
        self._count, self._broken, self.held = 0, False, []
        self._decoder.reset()
        return given

    def _take(self, byte: int) -> list[str]:
        self._count += 1
        if self._broken:
            return [REPLACEMENT]
        try:
            text = self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken, self.held = True, []
            return [REPLACEMENT] * self._count
        if text:
            self.held.append(text)
        return []

    def __copy__(self) -> Self:
        other = type(self)()
        other.held, other._count, other._broken = list(self.held), self._count, self._broken
        other._decoder.setstate(self._decoder.getstate())
        return other


class WordEnd:
    """Strings with a suffix at the end of a word: a space but for the last, which is held."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._last: str | None = None

    def feed(self, items: list[str]) -> list[str]:
        """The string that was held, and all new ones but the last."""
        given = []
        for item in items:
            if self._last is not None:
                given.append(self._last.replace(self._suffix, " "))
            self._last = item
        return given

    def finish(self) -> list[str]:
        """The last one."""
        last, self._last = self._last, None
        return [] if last is None else [last.replace(self._suffix, "")]


class StripStart:
    """A text's first characters, dropped where they are the given one.

    Args:
        content: the character.
        count: how many at most.
    """

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def feed(self, items: list[str]) -> list[str]:
        """The text without its beginning."""
        if not self._left:
            return items
        text = "".join(items)
        start = 0
        while self._left and start < len(text):
            if text[start] != self._content:
                self._left = 0
                break
            self._left -= 1
            start += 1
        return [text[start:]]

    def finish(self) -> list[str]:
        """Nothing: none is held."""
        return []


class Replace:
    """``str.replace`` for a text that comes in parts; holds what may begin ``pattern``."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    def feed(self, items: list[str]) -> list[str]:
        """The text, replaced, as far as it is certain."""
        parts = (self._held + "".join(items)).split(self._pattern)
        tail = parts[-1]
        length = min(len(tail), len(self._pattern) - 1)
        while not self._pattern.startswith(tail[len(tail) - length :]):
            length -= 1
        self._held = tail[len(tail) - length :]
        parts[-1] = tail[: len(tail) - length]
        return [self._content.join(parts)]

    def finish(self) -> list[str]:
        """The beginning of a pattern that has not come."""
        held, self._held = self._held, ""
        return [held]


# transformers' PreTrainedTokenizerBase.clean_up_tokenization, in its order.
CLEAN_UP = (
    *((" " + mark, mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((" " + ending, ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)


def _bytes_of(item: str) -> bytes:
    table = _byte_table()
    try:
        return bytes([table[char] for char in item])
    except KeyError:  # an added token, which is text
        return item.encode()


def bytes_of_token(string: str) -> bytes:
    """The bytes of a token that is a part of a character, by its string."""
    match = _BYTE_TOKEN.fullmatch(string)
    return _bytes_of(string) if match is None else bytes([int(match[1], 16)])


@cache
def _byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: their own where they print, the next free ones elsewhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printing = {ord(char) for char in alphabet if ord(char) < 256}
    others = iter(char for char in alphabet if ord(char) >= 256)
    return {chr(b) if b in printing else next(others): b for b in range(256)}


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
