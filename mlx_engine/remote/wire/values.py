"""Requests, options and errors as they travel, and back again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from mlx_engine import errors
from mlx_engine.asks import Ask, ChatPrompt, TextPrompt
from mlx_engine.config import MTP, DraftModel, SpecPrefill
from mlx_engine.errors import GenerationError, InvalidRequest, MLXEngineError
from mlx_engine.params import SamplingParams
from mlx_engine.remote.wire.frames import MAX_FRAME
from mlx_engine.remote.wire.messages import Failed, Generate, encode_strictly
from mlx_engine.turn import what_it_says

_STRATEGIES = {kind.__name__: kind for kind in (DraftModel, MTP, SpecPrefill)}
_PLAIN = (str, int, float, bool, type(None))


def ask_to_wire(number: int, ask: Ask, *, name: str, stream: bool, progress: bool) -> bytes:
    """The payload of a frame with a request.

    Raises:
        InvalidRequest: it has something in it that cannot go to another process.
    """
    check_processors(ask.params)
    source = ask.source
    if isinstance(source, ChatPrompt):
        option, prompt = "messages", None
        chat = (source.messages, source.tools, source.template_kwargs)
    else:
        option, prompt, chat = "prompt", source.prompt, None
    prefill = ask.prefill
    message = Generate(
        number=number,
        prompt=prompt,
        chat=chat,
        params=_changed(ask.params, SamplingParams()),
        priority=ask.priority,
        prefill=_fields(prefill) if isinstance(prefill, SpecPrefill) else prefill,
        decode=ask.decode,
        stream=stream,
        progress=progress,
        name=name,
    )
    try:
        payload = encode_strictly([message])
    except UnicodeEncodeError as error:
        option = "stop" if error.object in ask.params.stop else option
        raise InvalidRequest(option, f"is not valid Unicode text ({error})") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(
            option, f"has something in it that cannot go to another process: {error}"
        ) from error
    if len(payload) > MAX_FRAME:
        raise InvalidRequest(
            option, f"takes {len(payload)} bytes, of which {MAX_FRAME} may go to another process"
        )
    return payload


def check_processors(params: SamplingParams) -> None:
    """Raise ``InvalidRequest`` for functions, which cannot travel; names of some can."""
    for processor in params.logits_processors:
        if not isinstance(processor, str):
            raise InvalidRequest(
                "logits_processors",
                f"{processor!r} cannot go to another process; name a function that can be "
                "imported there: 'package.module:function'",
            )


def ask_from_wire(message: Generate, *, may_import: bool) -> Ask:
    """The request that a client has sent.

    Args:
        may_import: whether it may name functions to import.

    Raises:
        InvalidRequest: it is not acceptable.
    """
    if message.chat is not None:
        source: TextPrompt | ChatPrompt = ChatPrompt.of(*message.chat)
    else:
        source = TextPrompt(message.prompt)  # type: ignore[arg-type]
    params = SamplingParams.of(None, **message.params)
    if params.logits_processors and not may_import:
        raise InvalidRequest(
            "logits_processors", "this engine does not import functions for its clients"
        )
    prefill: Any = message.prefill
    if isinstance(prefill, dict):
        prefill = _made(SpecPrefill, "prefill", prefill)
    return Ask(source, params, message.priority, prefill, message.decode)  # type: ignore[arg-type]


def option_to_wire(value: Any) -> Any:
    """An option of an engine: strategies become a pair of their name and fields."""
    if isinstance(value, tuple(_STRATEGIES.values())):
        return [type(value).__name__, _fields(value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def option_from_wire(name: str, value: Any) -> Any:
    """The other way round."""
    if isinstance(value, list) and len(value) == 2 and value[0] in _STRATEGIES:
        return _made(_STRATEGIES[value[0]], name, value[1])
    return value


def error_to_wire(number: int, error: BaseException) -> Failed:
    """How a request failed; what is not one of our errors becomes a ``GenerationError``."""
    cause = error.__cause__
    if not isinstance(error, MLXEngineError):
        cause, error = error, GenerationError(f"the request failed: {what_it_says(error)}")
    return Failed(
        number=number,
        kind=type(error).__name__,
        message=_text(str(error)),
        state={k: _text(v) for k, v in vars(error).items() if isinstance(v, _PLAIN)},
        cause=None if cause is None else _text(what_it_says(cause)),
    )


def error_from_wire(failed: Failed) -> MLXEngineError:
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


def _text(value: Any) -> Any:
    """A string without what no UTF-8 has, and anything else as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _fields(value: Any) -> dict[str, Any]:
    return {
        field.name: option_to_wire(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }


def _changed(value: Any, default: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are in ``default``."""
    ours, others = _fields(value), _fields(default)
    return {name: ours[name] for name in ours if ours[name] != others[name]}


def _made(kind: type[Any], option: str, values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or not values.keys() <= known:
        raise InvalidRequest(option, f"is not {kind.__name__}(...): {values!r}")
    return kind(**values)
