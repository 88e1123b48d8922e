"""JSON of strangers: read as they mean it, and by nobody else's time.

Nothing else runs in the event loop while a body is decoded. What takes long of that is not its
bytes, but the objects that are made of them.
"""

from __future__ import annotations

import re

import msgspec

from mlx_engine.errors import InvalidRequest

_CONTAINERS = 2**17  # objects and lists of a body; 10,000 messages with parts and calls have 50,000
_VALUES = 2**21  # numbers are the most of those: a prompt may be token ids
_STRINGS = 2**20  # quotation marks of a body of which it is looked what is within them
_SURROGATES = 100_000  # escapes of a body in which halves are looked for

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# A pair of surrogates, or half of one, behind backslashes that stand for themselves.
_SURROGATE = re.compile(
    rb"(?<!\\)((?:\\\\)*+)"
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_HALF = len(rb"\ud800")
_MARK = b"\xef\xbb\xbf"  # of byte order, which editors and shells of Windows put before UTF-8


def decoded(body: bytearray) -> object:
    """The JSON value that a body is.

    Half of a surrogate pair is read as U+FFFD: agents cut the output of tools wherever their limit
    is, and have that in their conversation from then on.

    Raises:
        InvalidRequest: it is no JSON, or has more values than any request needs.
    """
    if body.startswith(_MARK):
        del body[: len(_MARK)]
    _check_values(body)
    try:
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError:
            if not 0 < body.count(rb"\ud") + body.count(rb"\uD") <= _SURROGATES:
                raise
            return msgspec.json.decode(_SURROGATE.sub(_whole, body))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", f"is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deep") from error


def _whole(found: re.Match[bytes]) -> bytes:
    return found[1] + rb"\ufffd" if len(found[2]) == _HALF else found[0]


def _check_values(body: bytearray) -> None:
    if _fits(body):  # whatever is in strings
        return
    bare = _STRING.sub(b"", body) if body.count(b'"') <= _STRINGS else body
    if not _fits(bare):
        said = f"has more than {_CONTAINERS} objects and lists, or {_VALUES} values"
        raise InvalidRequest("body", said)


def _fits(body: bytes | bytearray) -> bool:
    containers = body.count(b"{") + body.count(b"[")
    return containers <= _CONTAINERS and body.count(b",") <= _VALUES
