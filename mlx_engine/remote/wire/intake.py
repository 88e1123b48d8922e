"""The messages in a frame of a client that may be anybody, found in short steps.

msgpack says "an empty list" in one byte, and Python makes an object of 56: a frame of 8 MiB can
take seconds and half a gigabyte to decode, all the while holding the GIL. So what is large is
skipped through first, which is done at 400 MB/s and makes no objects, and its values are
counted; only what has no more of them than requests have is decoded at once. Token ids, of
which there may be millions, are decoded a piece at a time.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from mlx_engine.errors import ContextLengthExceeded, InvalidRequest, MLXEngineError
from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.messages import (
    Ask,
    ErrorReply,
    Generate,
    ToServer,
    decode_from_client,
    message_from_client,
    parts_of,
)
from mlx_engine.remote.wire.values import error_to_wire
from mlx_engine.requests import TokenIds

MAX_VALUES = 131_072  # in a request beside token ids; a list or a map counts as four
_SMALL = 32 * 2**10  # bytes that are decoded at once, whatever they are: 10 ms at worst
_COUNTED = 8192  # values in one step, 0.5 ms
_PIECE = 16 * 2**10  # bytes of token ids in one step, 1 ms

_PROMPT = 2  # its place in what has one
_NAMES = {_PROMPT: "prompt", 3: "messages", 4: "params", 6: "prefill"}
_NIL = b"\xc0"
_ONE_MESSAGE = 0x91  # the first byte of a list of one
_MANY = 0xDD  # of a list of more than 65,535
_WITH_PROMPT = (b"\xa8generate", b"\xa3ask")  # messages


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of a step.

    Attributes:
        message: what the client says, if that is known by now, or the answer to a request that
            is refused without being decoded.
        size: its bytes, if they are worth being counted.
    """

    message: ToServer | ErrorReply | None = None
    size: int = 0


def messages_in(frame: bytes, context_length: int | None) -> Iterator[Step]:
    """The messages in a frame of a client's, in steps of some milliseconds at most.

    Args:
        context_length: tokens that a prompt can have at most, if there is a limit.

    Raises:
        WireError: it is not what a client says.
    """
    if frame[:1] and frame[0] == _MANY:
        raise WireError("there are too many messages in a frame")
    if len(frame) <= _SMALL:
        yield from map(Step, decode_from_client(frame))
        return
    yield Step()
    whole = memoryview(frame)
    several = frame[0] != _ONE_MESSAGE
    for raw in parts_of(whole) if several else [whole[1:]]:
        yield Step()
        message = memoryview(raw)
        if len(message) <= _SMALL:
            yield Step(message_from_client(message))
        else:
            yield from _large(message, context_length)


def _large(raw: memoryview, context_length: int | None) -> Iterator[Step]:
    """A message of more bytes than can be decoded just like that; only a request has them."""
    if raw[0] & 0xF0 != 0x90:  # a list of less than sixteen
        raise WireError("no messages: it is no list, or a long one")
    parts = [memoryview(part) for part in parts_of(raw)]
    if len(parts) <= _PROMPT or bytes(parts[0][:16]) not in _WITH_PROMPT:
        raise WireError(f"a message of {len(raw)} bytes is no request")
    yield Step()
    number = _number(parts[1])
    tokens: TokenIds | None = None
    refusal: ErrorReply | None = None
    try:
        if len(parts[_PROMPT]) > _SMALL and (head := _list_head(parts[_PROMPT])) is not None:
            _check_fits(head[0], context_length)
            tokens = TokenIds()
            for piece in _token_ids(parts[_PROMPT][head[1] :]):
                tokens += piece
                yield Step()
            parts[_PROMPT] = memoryview(_NIL)
        for _ in _counted(parts):
            yield Step()
    except MLXEngineError as error:
        refusal = error_to_wire(number, error)  # and not the error, whose frames hold the message
    if refusal is not None:
        yield Step(refusal)
        return
    message = message_from_client(memoryview(b"".join([raw[:1], *parts])))
    yield Step()
    if tokens is not None and isinstance(message, Generate | Ask):
        message.prompt = tokens
    yield Step(message, len(raw))


def _number(part: memoryview) -> int:
    try:
        return msgspec.msgpack.decode(part, type=int)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(f"no messages: {error}") from error


def _check_fits(count: int, context_length: int | None) -> None:
    if context_length is not None and count > context_length:
        raise ContextLengthExceeded(
            f"the prompt has {count} tokens; the context has {context_length}",
            prompt_tokens=count,
            max_tokens=None,
            context_length=context_length,
        )


# ── msgpack ─────────────────────────────────────────────────────────────────────────────────


def _fixed_sizes() -> list[int]:
    """Bytes that a value takes by its first one, without what is in it; 0 if they vary."""
    sizes = [1] * 256
    sizes[0xA0:0xC0] = range(1, 33)  # short text
    for first, size in enumerate((5, 9, 2, 3, 5, 9, 2, 3, 5, 9), 0xCA):
        sizes[first] = size  # numbers
    for first, size in enumerate((3, 4, 6, 10, 18), 0xD4):
        sizes[first] = size  # extensions
    for first, size in ((0xDC, 3), (0xDD, 5), (0xDE, 3), (0xDF, 5)):
        sizes[first] = size  # heads of lists and maps
    for first in _VARYING:
        sizes[first] = 0
    return sizes


# Text, bytes and extensions with a length: its form, and what comes between it and the content.
_VARYING = {
    0xC4: (">B", 0),
    0xC5: (">H", 0),
    0xC6: (">I", 0),
    0xC7: (">B", 1),
    0xC8: (">H", 1),
    0xC9: (">I", 1),
    0xD9: (">B", 0),
    0xDA: (">H", 0),
    0xDB: (">I", 0),
}
_SIZES = _fixed_sizes()
_WEIGHTS = [4 if 0x80 <= first < 0xA0 or 0xDC <= first < 0xE0 else 1 for first in range(256)]

_TOKEN = rb"[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}|\xcf.{8}"  # integers that are not negative
_one_token = re.compile(_TOKEN, re.DOTALL)
_many_tokens = re.compile(rb"(?:" + _TOKEN + rb")*+", re.DOTALL)
_integers = msgspec.msgpack.Decoder(list[int])


def _counted(parts: list[memoryview]) -> Iterator[None]:
    """Count the values of a request; the parts are sound msgpack.

    Raises:
        InvalidRequest: there are too many.
    """
    values = steps = 0
    for index, part in enumerate(parts):
        place, size = 0, len(part)
        while place < size:
            first = part[place]
            values += _WEIGHTS[first]
            steps += 1
            place += _SIZES[first] or _length(part, place)
            if values > MAX_VALUES:
                raise InvalidRequest(
                    _NAMES.get(index, "params"),
                    f"has more than the {MAX_VALUES:,} values that a request may have here",
                )
            if steps % _COUNTED == 0:
                yield


def _length(part: memoryview, place: int) -> int:
    """Bytes of a value that says itself how many they are."""
    form, between = _VARYING[part[place]]
    (length,) = struct.unpack_from(form, part, place + 1)
    return 1 + struct.calcsize(form) + between + int(length)


def _list_head(part: memoryview) -> tuple[int, int] | None:
    """The number of entries of a list that is not short, and where they begin."""
    match part[0]:
        case 0xDC:
            return int.from_bytes(part[1:3], "big"), 3
        case 0xDD:
            return int.from_bytes(part[1:5], "big"), 5
    return None


def _token_ids(entries: memoryview) -> Iterator[list[int]]:
    """The token ids in a list, some at a time.

    Raises:
        InvalidRequest: something else is in it.
    """
    place = 0
    while place < len(entries):
        found = _many_tokens.match(entries, place, place + _PIECE)
        if found is None or found.end() == place:
            raise InvalidRequest("prompt", "must be a string or a list of token ids")
        piece = entries[place : found.end()]
        count = len(_one_token.findall(piece))
        yield _integers.decode(b"\xdd" + count.to_bytes(4, "big") + piece)
        place = found.end()
