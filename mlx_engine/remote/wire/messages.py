"""Messages between an engine and those who use it from elsewhere.

A frame is a list of messages in msgpack, each with its kind in front; nothing in one is ever
unpickled. The first message of a client is ``Hello``, in every version.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from mlx_engine.outputs import (
    EngineStats,
    FinishReason,
    GenerationResult,
    Segment,
    ShutdownReport,
    TokenLogprob,
    ToolCallDelta,
)
from mlx_engine.questions import PromptFacts, Subject
from mlx_engine.remote.wire.frames import WireError
from mlx_engine.remote.wire.json_values import extension_from_wire

T = TypeVar("T")

VERSION = 7
MAGIC = "mlx_engine"

Phase = Literal["start", "load", "idle", "prefill", "decode"]


class _Message(msgspec.Struct, array_like=True, tag=str.lower):
    """A message, as an array: its kind, and then its fields."""


class Hello(_Message):
    """A client's first word."""

    magic: str = MAGIC
    version: int = VERSION


class Configure(_Message):
    """The engine to make; only the parent of an engine's process says that.

    Attributes:
        kind: ``simple`` or ``batched``.
        options: keyword arguments of the engine, as ``options.to_wire`` makes them.
        sys_path: where functions that are given by name may be found.
        heartbeat_interval: seconds.
        memory: bytes that it may have, whatever its options say; ``None`` is no bound.
        name: of the engine, as its parent calls it.
    """

    kind: str
    model: str
    options: dict[str, Any]
    sys_path: list[str]
    heartbeat_interval: float
    memory: int | None = None
    name: str = ""


class Budget(_Message):
    """Bytes that the engine may have from now on; only the parent of its process says that."""

    memory: int


class BudgetTaken(_Message):
    """The engine's process will have no more than that, once it has dropped what it has beyond.

    Attributes:
        memory: bytes, as in the ``Budget`` that this answers.
        used: bytes that it has now.
    """

    memory: int
    used: int


Chat = tuple[list[Any], list[Any] | None, dict[str, Any], dict[str, Any]]
"""Messages, tools, and variables of the template, by ``json_values``; and the other options of a
chat that are not at their defaults.
"""


class Generate(_Message):
    """A request, by a number of the client's choice.

    Attributes:
        prompt: text or token ids; ``None`` in a chat.
        chat: ``None`` if it is none.
        params: fields of ``SamplingParams`` that are not at their defaults.
        prefill: ``"default"``, ``None``, or fields of ``SpecPrefill``.
        stream: whether chunks are wanted.
        progress: whether its progress is to be told.
        name: what its caller calls it; for messages.
        timeout, max_wait: seconds; ``None`` is no limit.
    """

    number: int
    prompt: str | list[int] | None
    chat: Chat | None
    params: dict[str, Any]
    priority: int
    prefill: str | dict[str, Any] | None
    decode: str | None
    stream: bool
    progress: bool
    name: str = ""
    timeout: float | None = None
    max_wait: float | None = None


class Cancel(_Message):
    """An order to stop a request; ``Done`` or ``ErrorReply`` follows once it is out of MLX."""

    number: int


class Ask(_Message):
    """A question about a prompt; its first fields are those of ``Generate``."""

    number: int
    prompt: str | list[int] | None
    chat: Chat | None
    subject: Subject


class CacheFile(_Message):
    """An order to save or load the prompt cache."""

    number: int
    action: Literal["save", "load"]
    path: str


class Shutdown(_Message):
    """An order to drain for so many seconds, abort the rest, and end."""

    remaining: float | None


class Welcome(_Message):
    """The engine is ready."""

    model: str | None
    has_chat_template: bool
    supports_tools: bool
    supports_reasoning: bool
    context_length: int | None
    width: int
    stats: EngineStats


class Refused(_Message):
    """The reason for which the connection will be closed."""

    reason: str


class ProgressUpdate(_Message):
    """Progress of a request, or of the start where the number is 0."""

    number: int
    phase: Literal["download", "convert", "load", "score", "prefill", "batch"]
    done: int
    total: int | None


class Chunk(_Message):
    """A ``GenerationChunk`` of a request."""

    number: int
    text: str
    tokens: tuple[int, ...]
    segment: Segment
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    tool_call: ToolCallDelta | None = None


class Done(_Message):
    """A request is over, and this is its result; after ``Cancel``, what there was by then.

    Attributes:
        arguments: of each of its tool calls, by ``json_values``; the result is without them.
    """

    number: int
    result: GenerationResult
    arguments: list[dict[Any, Any]]


class Facts(_Message):
    """The answer to a question about a prompt."""

    number: int
    facts: PromptFacts


class CacheFileDone(_Message):
    """The prompt cache is saved or loaded."""

    number: int
    prompts: int


class ErrorReply(_Message):
    """A request has failed; the start, where the number is 0.

    Attributes:
        kind: name of the error's class.
        state: its attributes.
        cause: what the error it was raised from says.
    """

    number: int
    kind: str
    message: str
    state: dict[str, Any]
    cause: str | None


class Heartbeat(_Message):
    """A sign of life.

    Attributes:
        progress: counts steps: pieces of a load, prefill chunks, decode steps.
        phase: what the engine is doing.
        age: seconds since ``progress`` last grew, or since there was nothing to do.
        pending: requests that it has.
        stats: its counters, once it is there.
    """

    progress: int = 0
    phase: Phase = "start"
    age: float = 0.0
    pending: int = 0
    stats: EngineStats | None = None


class Draining(_Message):
    """The engine was asked by somebody else to end, and drains."""

    reason: str


class Stopped(_Message):
    """The engine has drained, and ends."""

    report: ShutdownReport


ToServer = Hello | Configure | Budget | Generate | Ask | Cancel | CacheFile | Shutdown
ToClient = (
    Welcome
    | Refused
    | ProgressUpdate
    | Chunk
    | Done
    | Facts
    | CacheFileDone
    | ErrorReply
    | Heartbeat
    | BudgetTaken
    | Draining
    | Stopped
)


def encode(messages: list[Any]) -> bytes:
    """The payload of a frame with these messages.

    Raises:
        Exception: one of them has a value that cannot be written, of several kinds.
    """
    return _encoder.encode(messages)


def encode_strictly(messages: list[Any]) -> bytes:
    """The payload of a frame; values that msgpack has no form for are refused.

    Raises:
        TypeError, ValueError, OverflowError: there is one.
    """
    return _strict_encoder.encode(messages)


def decode_from_client(payload: bytes) -> list[ToServer]:
    """The messages in a frame of a client's.

    Raises:
        WireError: it is not what a client says.
    """
    return _decoded(_from_client, payload)


def message_from_client(payload: bytes | memoryview) -> ToServer:
    """The message of a client's that has no list around it.

    Raises:
        WireError: it is not what a client says.
    """
    return _decoded(_one_from_client, payload)


def parts_of(payload: bytes | memoryview) -> list[msgspec.Raw]:
    """The entries of a list, none of which is looked into.

    Raises:
        WireError: it is no list, or no msgpack.
    """
    return _decoded(_parts, payload)


def decode_from_server(payload: bytes) -> list[ToClient]:
    """The messages in a frame of a server's.

    Raises:
        WireError: it is not what a server says.
    """
    return _decoded(_from_server, payload)


def _decoded(decoder: msgspec.msgpack.Decoder[T], payload: bytes | memoryview) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise WireError(f"no messages: {error}") from error


def _plain(value: object) -> object:
    """Values that msgpack has no form for, as parsers of tool calls may make them."""
    if isinstance(value, set | frozenset):
        return list(value)
    return repr(value)


_strict_encoder = msgspec.msgpack.Encoder()
_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_from_client = msgspec.msgpack.Decoder(list[ToServer], ext_hook=extension_from_wire)
_one_from_client: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(
    ToServer, ext_hook=extension_from_wire
)
_parts = msgspec.msgpack.Decoder(list[msgspec.Raw])
_from_server = msgspec.msgpack.Decoder(list[ToClient], ext_hook=extension_from_wire)
