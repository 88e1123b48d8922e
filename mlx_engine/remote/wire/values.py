"""Requests, options and errors as they travel, and back again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_engine import errors
from mlx_engine.chat.answer_format import ReasoningFormat, ToolFormat
from mlx_engine.checks import shown
from mlx_engine.constraints import AnyJSON, Choice, Grammar, JSONSchema, Regex
from mlx_engine.errors import GenerationError, InvalidRequest, MLXEngineError, describe
from mlx_engine.limits import RequestLimits
from mlx_engine.outputs import GenerationChunk, GenerationResult, ToolCall
from mlx_engine.params import SamplingParams
from mlx_engine.questions import PromptQuestion
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.json_values import PLAIN, encodable, simple, to_wire
from mlx_engine.remote.wire.messages import (
    Ask,
    Chat,
    Chunk,
    Done,
    ErrorReply,
    Generate,
    encode_strictly,
)
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt
from mlx_engine.strategies import MTP, DraftModel, SpecPrefill

_KINDS = (DraftModel, MTP, SpecPrefill, RequestLimits, ToolFormat, ReasoningFormat)
_CONFIGS: dict[str, type[Any]] = {kind.__name__: kind for kind in _KINDS}
_CONSTRAINTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (JSONSchema, Regex, Grammar, Choice, AnyJSON)
}
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
    prompt, chat = _source_to_wire(request.source)
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
        timeout=request.timeout,
        max_wait=request.max_wait,
    )
    return _payload(message, {**message.params, "priority": request.priority}, limit)


def question_to_wire(number: int, question: PromptQuestion, limit: int = MAX_FRAME) -> bytes:
    """The payload of a frame with a question about a prompt; see ``request_to_wire``."""
    prompt, chat = _source_to_wire(question.source)
    return _payload(Ask(number, prompt, chat, question.subject), {}, limit)


def _source_to_wire(source: TextPrompt | ChatPrompt) -> tuple[str | list[int] | None, Chat | None]:
    if isinstance(source, TextPrompt):
        return source.prompt, None
    given = source.messages, source.tools, source.template_kwargs
    messages, tools, kwargs = map(_part, _PARTS, given)
    options = {name: getattr(source, name) for name in _CHAT_DEFAULTS}
    changed = {name: v for name, v in options.items() if v != _CHAT_DEFAULTS[name]}
    return None, (messages, tools, kwargs, changed)


def _payload(message: Generate | Ask, options: dict[str, Any], limit: int) -> bytes:
    """The payload of a frame with a message that has a prompt.

    Args:
        options: what else of it may be impossible to write, by name.
    """
    chat = message.chat
    parts = {} if chat is None else dict(zip(_PARTS, chat, strict=False))
    try:
        payload = encode_strictly([message])
    except _UNWRITABLE:
        for part, value in (options | parts).items():
            _encoded(part, value)  # it may be this that cannot be written
        payload = _encoded("prompt" if chat is None else "messages", message)
    if len(payload) > limit:
        sizes = {part: len(_encoded(part, value)) for part, value in parts.items()}
        raise InvalidRequest(
            max(sizes, key=lambda part: sizes[part], default="prompt"),
            f"takes {len(payload)} bytes with the rest of the request, of which {limit} may go "
            "to another process",
        )
    return payload


_PARTS = ("messages", "tools", "chat_template_kwargs")  # of a chat, as its caller knows them
_CHAT_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ChatPrompt)
    if field.default is not dataclasses.MISSING
}


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
    source = _source_from_wire(message, limits)
    given = dict(message.params)
    if (constraint := given.get("constraint")) is not None:
        given["constraint"] = _constraint_from_wire(constraint, limits)
    params = limits.params(None, given)
    if params.logits_processors and not trusted:
        raise InvalidRequest(
            "logits_processors", "this engine does not import functions for its clients"
        )
    prefill: Any = message.prefill
    if isinstance(prefill, dict):
        prefill = _made(SpecPrefill, "prefill", prefill)
    decode: Any = message.decode
    limits_of_time = message.timeout, message.max_wait
    return GenerationRequest(source, params, message.priority, prefill, decode, *limits_of_time)


def question_from_wire(message: Ask, *, limits: RequestLimits) -> PromptQuestion:
    """The question that a client has sent; see ``request_from_wire``."""
    return PromptQuestion(message.subject, _source_from_wire(message, limits))


def _source_from_wire(message: Generate | Ask, limits: RequestLimits) -> TextPrompt | ChatPrompt:
    if message.chat is None:
        return TextPrompt.of(message.prompt, limits)
    messages, tools, template_kwargs, options = message.chat
    if unknown := options.keys() - _CHAT_DEFAULTS.keys():
        raise InvalidRequest(f"{min(unknown):.64}", "there is no such option")
    return ChatPrompt.of(messages, tools, template_kwargs, limits, **options)


def option_to_wire(value: Any) -> Any:
    """An option of an engine: strategies, limits and formats become a pair of name and fields."""
    if isinstance(value, JSONSchema):
        return [JSONSchema.__name__, {"schema": value.text}]  # integers of any size in it
    if isinstance(value, (*_CONFIGS.values(), *_CONSTRAINTS.values())):
        return [type(value).__name__, _fields(value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else simple(value)


def chunk_to_wire(number: int, chunk: GenerationChunk) -> Chunk:
    """A chunk; what the model has written of a call is text that UTF-8 has."""
    delta = chunk.tool_call
    if delta is not None:
        written = ("id", "name", "arguments", "error")
        delta = replace(delta, **{name: encodable(getattr(delta, name)) for name in written})
    return Chunk(
        number,
        encodable(chunk.text),
        chunk.tokens,
        chunk.segment,
        chunk.logprobs,
        chunk.finish_reason,
        delta,
    )


def result_to_wire(number: int, result: GenerationResult) -> Done:
    """A result; what the model has written as arguments of tool calls goes as in a request."""
    calls, arguments = list[ToolCall](), list[dict[Any, Any]]()
    for call in result.tool_calls:
        given, error = dict[Any, Any](), call.error
        try:
            given = to_wire(call.arguments, lenient=True)
        except _UNWRITABLE as failure:  # a key, or a huge number
            error = f"its arguments are no JSON: {describe(failure)}"
        written = {"name": call.name, "id": call.id, "raw": call.raw, "error": error}
        ours = {name: encodable(text) for name, text in written.items()}
        calls.append(replace(call, arguments={}, **ours))
        arguments.append(given)
    return Done(number, replace(result, tool_calls=tuple(calls)), arguments)


def result_from_wire(done: Done) -> GenerationResult:
    """A result, as it was before ``result_to_wire``."""
    if not done.arguments:
        return done.result
    calls = tuple(
        replace(call, arguments=given)
        for call, given in zip(done.result.tool_calls, done.arguments, strict=True)
    )
    return replace(done.result, tool_calls=calls, parsed=None)  # that is made where it is asked for


def _constraint_from_wire(value: object, limits: RequestLimits) -> Any:
    limits.check_values("constraint", "constraint_characters", value)
    match value:
        case [str(kind), dict(given)] if kind in _CONSTRAINTS:
            return _made(_CONSTRAINTS[kind], "constraint", given)
    raise InvalidRequest("constraint", f"is none: {shown(value)}")


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
        if field.init
    }


def _changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    fields = _fields(params)
    return {name: value for name, value in fields.items() if value != _DEFAULTS[name]}


_DEFAULTS = _fields(SamplingParams())


def _made(kind: type[Any], option: str, values: Mapping[str, Any]) -> Any:
    fields = [field for field in dataclasses.fields(kind) if field.init]
    missing = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    known = {field.name for field in fields}
    if not isinstance(values, Mapping) or not needed <= values.keys() <= known:
        raise InvalidRequest(option, f"is not {kind.__name__}(...): {shown(values)}")
    return kind(**values)
