"""Requests, options and errors as they travel, and back again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_engine import errors
from mlx_engine.checks import shown
from mlx_engine.errors import GenerationError, InvalidRequest, MLXEngineError, describe
from mlx_engine.limits import RequestLimits
from mlx_engine.outputs import GenerationResult, ToolCall
from mlx_engine.params import SamplingParams
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.json_values import PLAIN, encodable, simple, to_wire
from mlx_engine.remote.wire.messages import Done, ErrorReply, Generate, encode_strictly
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt
from mlx_engine.strategies import MTP, DraftModel, SpecPrefill

_CONFIGS = {kind.__name__: kind for kind in (DraftModel, MTP, SpecPrefill, RequestLimits)}
_UNWRITABLE = (TypeError, ValueError, OverflowError, RecursionError)


def request_to_wire(
    number: int,
    request: GenerationRequest,
    *,
    name: str,
    stream: bool,
    progress: bool,
    limit: int = MAX_FRAME,
) -> bytes:
    """The payload of a frame with a request.

    Args:
        limit: bytes that it may have.

    Raises:
        InvalidRequest: it has something in it that cannot go to another process.
    """
    source = request.source
    if isinstance(source, ChatPrompt):
        prompt, chat = None, tuple(map(_part, _PARTS, _parts(source)))
    else:
        prompt, chat = source.prompt, None
    prefill = request.prefill
    message = Generate(
        number=number,
        prompt=prompt,
        chat=chat,
        params=_changed(request.params),
        priority=request.priority,
        prefill=_fields(prefill) if isinstance(prefill, SpecPrefill) else prefill,
        decode=request.decode,
        stream=stream,
        progress=progress,
        name=name,
    )
    try:
        payload = encode_strictly([message])
    except _UNWRITABLE:
        for part, value in (*message.params.items(), ("priority", request.priority)):
            _encoded(part, value)  # it may be this that cannot be written
        for part, value in zip(_PARTS, chat or (), strict=False):
            _encoded(part, value)
        payload = _encoded("prompt" if chat is None else "messages", message)
    if len(payload) > limit:
        sizes = (
            {"prompt": 0}
            if chat is None
            else {
                part: len(_encoded(part, value)) for part, value in zip(_PARTS, chat, strict=True)
            }
        )
        raise InvalidRequest(
            max(sizes, key=lambda part: sizes[part]),
            f"takes {len(payload)} bytes with the rest of the request, of which {limit} may go "
            "to another process",
        )
    return payload


_PARTS = ("messages", "tools", "chat_template_kwargs")  # of a chat, as its caller knows them


def _parts(chat: ChatPrompt) -> tuple[Any, Any, Any]:
    return chat.messages, chat.tools, chat.template_kwargs


def _part(option: str, value: Any) -> Any:
    try:
        return to_wire(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            option, f"has something in it that cannot go to another process: {error}"
        ) from error


def _encoded(option: str, value: Any) -> bytes:
    try:
        return encode_strictly([value])
    except UnicodeEncodeError as error:
        raise InvalidRequest(option, f"is not valid Unicode text ({error})") from error
    except _UNWRITABLE as error:
        raise InvalidRequest(
            option, f"has something in it that cannot go to another process: {error}"
        ) from error


def check_processors(params: SamplingParams) -> None:
    """Raise ``InvalidRequest`` for functions, which cannot travel; names of some can."""
    for processor in params.logits_processors:
        if not isinstance(processor, str):
            raise InvalidRequest(
                "logits_processors",
                f"{shown(processor)} cannot go to another process; name a function that can be "
                "imported there: 'package.module:function'",
            )


def request_from_wire(
    message: Generate, *, trusted: bool, limits: RequestLimits
) -> GenerationRequest:
    """The request that a client has sent.

    Args:
        trusted: whether it may name functions to import.
        limits: how large it may be.

    Raises:
        InvalidRequest: it is not acceptable.
    """
    if message.chat is not None:
        source: TextPrompt | ChatPrompt = ChatPrompt.of(*message.chat, limits)
    else:
        source = TextPrompt.of(message.prompt, limits)
    params = limits.params(None, message.params)
    if params.logits_processors and not trusted:
        raise InvalidRequest(
            "logits_processors", "this engine does not import functions for its clients"
        )
    prefill: Any = message.prefill
    if isinstance(prefill, dict):
        prefill = _made(SpecPrefill, "prefill", prefill)
    return GenerationRequest(source, params, message.priority, prefill, message.decode)  # type: ignore[arg-type]


def option_to_wire(value: Any) -> Any:
    """An option of an engine: strategies and limits become a pair of their name and fields."""
    if isinstance(value, tuple(_CONFIGS.values())):
        return [type(value).__name__, _fields(value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else simple(value)


def result_to_wire(number: int, result: GenerationResult) -> Done:
    """A result; what the model has written as arguments of tool calls goes as in a request."""
    calls, arguments = list[ToolCall](), list[dict[Any, Any] | None]()
    for call in result.tool_calls:
        given, error = None, call.error
        if call.arguments is not None:
            try:
                given = to_wire(call.arguments, lenient=True)
            except _UNWRITABLE as failure:  # a key, or a huge number
                error = f"its arguments are no JSON: {describe(failure)}"
                given = None
        name = encodable(call.name) if error is None else None
        ours = {"id": encodable(call.id), "raw": encodable(call.raw), "error": encodable(error)}
        calls.append(replace(call, name=name, arguments=None, **ours))
        arguments.append(given)
    return Done(number, replace(result, tool_calls=tuple(calls)), arguments)


def result_from_wire(done: Done) -> GenerationResult:
    """A result, as it was before ``result_to_wire``."""
    if not done.arguments:
        return done.result
    calls = tuple(
        call if given is None else replace(call, arguments=given)
        for call, given in zip(done.result.tool_calls, done.arguments, strict=True)
    )
    return replace(done.result, tool_calls=calls)


def option_from_wire(name: str, value: Any) -> Any:
    """An option of an engine, as it was before ``option_to_wire``."""
    if isinstance(value, list) and len(value) == 2 and value[0] in _CONFIGS:
        return _made(_CONFIGS[value[0]], name, value[1])
    return value


def error_to_wire(number: int, error: BaseException) -> ErrorReply:
    """The error of a request; what is not one of ours becomes a ``GenerationError``."""
    cause = error.__cause__
    if not isinstance(error, MLXEngineError):
        cause, error = error, GenerationError(f"the request failed: {describe(error)}")
    return ErrorReply(
        number=number,
        kind=type(error).__name__,
        message=encodable(str(error)),
        state={k: encodable(v) for k, v in vars(error).items() if isinstance(v, PLAIN)},
        cause=None if cause is None else encodable(describe(cause)),
    )


def error_from_wire(failed: ErrorReply) -> MLXEngineError:
    """The error to raise here; its cause is told in words."""
    kind = getattr(errors, failed.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, MLXEngineError)):
        kind = MLXEngineError
    error = errors.rebuild(kind, failed.message, failed.state)
    if failed.cause is not None:
        error.__cause__ = RemoteCause(failed.cause)
    return error


class RemoteCause(Exception):
    """The error in another process from which one of ours was raised, in words."""


def _fields(value: Any) -> dict[str, Any]:
    return {
        field.name: option_to_wire(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }


def _changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    fields = _fields(params)
    return {name: value for name, value in fields.items() if value != _DEFAULTS[name]}


_DEFAULTS = _fields(SamplingParams())


def _made(kind: type[Any], option: str, values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or not values.keys() <= known:
        raise InvalidRequest(option, f"is not {kind.__name__}(...): {shown(values)}")
    return kind(**values)
