"""Conversations as callers send them: shape checks, and one form for all that mean the same.

What a model's chat template makes of them is not known here. What has been through once goes
through again unchanged: a conversation may be checked on both sides of a wire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import RequestLimits
from mlx_engine.outputs import GenerationResult


class Message(TypedDict, total=False):
    """A message of a chat, as in OpenAI's API: what ``list[Message]`` holds for type checkers.

    ``role`` must be there. Without ``content`` a message has no text, and without
    ``tool_call_id`` the result of a tool answers the first call that has none yet.

    Attributes:
        role: of the speaker: ``system`` or ``developer``, ``user``, ``assistant``, ``tool``.
        content: text, or a list of parts of it, ``{"type": "text", "text": ...}``; ``None`` in a
            message of the assistant is no text. The result of a tool may be any JSON value.
        name: of the speaker, or of the tool.
        tool_calls: of an assistant: ``{"function": {"name": ..., "arguments": ...}}``, and an
            ``id``.
        tool_call_id: of a tool: which call it answers.
        reasoning_content: of an assistant: what it thought aloud; ``reasoning`` and ``thinking``
            are other names for it.
    """

    role: Required[str]
    content: Any
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    reasoning_content: str


LEADING = ("system", "developer")  # roles that speak before all others
ANY_USER = {"role": "user", "content": "..."}  # where it only matters that there is one

REASONING = ("reasoning_content", "reasoning", "thinking")  # names of an assistant's reasoning

# Those of OpenAI's API come first; the others are of some families' chat templates.
ROLES = (
    *("system", "developer", "user", "assistant", "tool"),
    *("function", "ipython", "observation", "document", "control"),
)

_SPEECH = {"system", "developer", "user"}  # roles of which a message without content is none
_TEXTS = {"text", "input_text", "output_text"}
_MEDIA = {"image", "image_url", "input_image", "input_audio", "audio", "video", "video_url", "file"}
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one without an end, too


def checked_messages(messages: object, limits: RequestLimits) -> list[dict[str, Any]]:
    """Copies of messages, with ``content`` as text, and arguments of calls as mappings.

    Arguments that are no JSON object, as of a call that was cut off, stay the text that they are.

    Raises:
        InvalidRequest: they are of the wrong shape, or too large.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            "messages", "must be a list of messages, as in [{'role': 'user', 'content': 'Hi'}]"
        )
    if not messages:
        raise InvalidRequest("messages", "must not be empty")
    limits.check("messages", "messages", len(messages), "messages")
    messages = [one.message() if isinstance(one, GenerationResult) else one for one in messages]
    _check_values(messages, limits)
    room = _Room(limits)
    copies = [_message(index, message, limits, room) for index, message in enumerate(messages)]
    if any(copy.get("tool_calls") or copy["role"] == "tool" for copy in copies):
        # With arguments that came as JSON, and results that became JSON.
        _check_values(copies, limits)
    return copies


def _check_values(messages: list[Any], limits: RequestLimits) -> None:
    """Look at all of them, and name the message that is wrong by itself, if one is."""
    option, limit = "messages", "text_characters"
    try:
        limits.check_values(option, limit, messages)
    except InvalidRequest:
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            which = (
                f"number {index} ({shown(role)})" if isinstance(role, str) else f"number {index}"
            )
            limits.check_values(option, limit, message, of=which)
        raise


def checked_tools(tools: object, limits: RequestLimits) -> list[dict[str, Any]] | None:
    """Copies of descriptions of tools; ``None`` if there are none.

    Raises:
        InvalidRequest: they are of the wrong shape, or too large.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidRequest("tools", "must be a list of tools, as in [{'type': 'function', ...}]")
    limits.check("tools", "tools", len(tools), "tools")
    tools = list(tools)
    limits.check_values("tools", "tool_characters", tools)
    for number, tool in enumerate(tools):
        _check_tool(number, tool, limits)
    return [dict(tool) for tool in tools] or None


def _check_tool(number: int, tool: object, limits: RequestLimits) -> None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not (
        isinstance(tool, Mapping)
        and isinstance(function, Mapping)
        and tool.get("type", "function") == "function"
    ):
        raise InvalidRequest(
            "tools",
            f"number {number} must be {{'type': 'function', 'function': {{'name': ..., "
            f"'description': ..., 'parameters': ...}}}}, not {shown(tool)}",
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("tools", f"number {number} has no name: {shown(function)}")
    limits.check_name("tools", name, of=f"number {number}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(
            "tools",
            f"number {number} ({shown(name)}): 'parameters' must be a mapping, a JSON schema, not "
            f"{shown(parameters)}",
        )


def name_of_tool(tool: Mapping[str, Any]) -> str | None:
    """The name in a tool's description; ``None`` if there is none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _message(index: int, message: object, limits: RequestLimits, room: _Room) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(
            "messages", f"number {index} must be a mapping with a 'role', not {shown(message)}"
        )
    copy = {key: value for key, value in message.items() if value is not None}
    which = f"number {index} ({shown(message['role'])})"
    limits.check_name("messages", copy["role"], of=which)
    if copy["role"] not in ROLES:
        raise InvalidRequest(
            "messages", f"{which}: there is no such role; there are {', '.join(ROLES[:5])}"
        )
    if copy["role"] == "function":  # as OpenAI's API had it before tools
        copy["role"] = "tool"
    for name in ("name", "tool_call_id"):
        if name in copy and not isinstance(copy[name], str):
            raise InvalidRequest(
                "messages", f"{which}: {name!r} must be text, not {shown(copy[name])}"
            )
    copy["content"] = _content(which, copy)
    if copy["role"] == "assistant":
        _take_reasoning(which, copy)
    calls = _calls(which, copy, limits, room)
    if calls:
        copy["tool_calls"] = calls
    return copy


def _content(which: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    is_result = message["role"] == "tool"
    if isinstance(content, str):
        return str(content)
    if content is None:
        if message["role"] in _SPEECH:
            raise InvalidRequest("messages", f"{which} has no 'content'")
        return ""
    if isinstance(content, Sequence) and not (is_result and not _are_parts(content)):
        return "".join(_part(which, part) for part in content)
    if not is_result:
        raise InvalidRequest("messages", f"{which}: 'content' must be text, not {shown(content)}")
    try:
        return json.dumps(content, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            "messages", f"{which}: 'content' must be text or a JSON value ({error})"
        ) from error


def _are_parts(content: Sequence[Any]) -> bool:
    """Whether a list is one of parts, and not the value that a tool has given."""
    return all(
        isinstance(part, Mapping)
        and isinstance(kind := part.get("type"), str)
        and kind in _TEXTS | _MEDIA
        for part in content
    )


def _part(which: str, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "refusal":  # is text, too
        part = {"type": "text", "text": part.get("refusal")}
    if not isinstance(part, Mapping) or part.get("type") not in tuple(_TEXTS):
        kind = shown(part.get("type") if isinstance(part, Mapping) else part)
        raise InvalidRequest("messages", f"{which}: only text parts are supported, not {kind}")
    if not isinstance(text := part.get("text"), str):
        raise InvalidRequest(
            "messages", f"{which}: the 'text' of a text part must be text, not {shown(text)}"
        )
    return text


def _take_reasoning(which: str, message: dict[str, Any]) -> None:
    """Have it under one name."""
    given = [(name, message.pop(name)) for name in REASONING if name in message]
    for name, text in given:
        if not isinstance(text, str):
            raise InvalidRequest("messages", f"{which}: {name!r} must be text, not {shown(text)}")
    text = next((text for _, text in given if text), "")
    if text:
        message["reasoning_content"] = text


def _calls(
    which: str, message: dict[str, Any], limits: RequestLimits, room: _Room
) -> list[dict[str, Any]]:
    calls = message.pop("tool_calls", None)
    function = message.pop("function_call", None)  # as OpenAI's API had it before tools
    if not calls and function is not None:
        calls = [{"type": "function", "function": function}]
    if not calls:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise InvalidRequest("messages", f"{which}: 'tool_calls' must be a list")
    limits.check("messages", "tool_calls", len(calls), "tool calls", of=which)
    return [_call(which, call, limits, room) for call in calls]


def _call(which: str, call: object, limits: RequestLimits, room: _Room) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidRequest(
            "messages",
            f"{which}: a tool call must be a mapping with a 'function', not {shown(call)}",
        )
    if not isinstance(name := function.get("name"), str):
        raise InvalidRequest(
            "messages", f"{which}: the name of a function must be text, not {shown(name)}"
        )
    if not isinstance(given := call.get("id"), str | None):
        raise InvalidRequest(
            "messages", f"{which}: the id of a tool call must be text, not {shown(given)}"
        )
    limits.check_name("messages", name, of=which)
    copy = dict(function)
    arguments = copy.get("arguments")
    if isinstance(arguments, str):
        room.take(which, arguments)
        copy["arguments"] = _from_json(which, arguments)
    elif arguments is None:
        copy["arguments"] = {}
    elif not isinstance(arguments, Mapping):
        raise InvalidRequest(
            "messages",
            f"{which}: the arguments of a tool call must be a mapping, or JSON, not "
            f"{shown(arguments)}",
        )
    kept = {key: value for key, value in call.items() if value is not None}
    return {**kept, "function": copy}


def _from_json(which: str, text: str) -> Any:
    try:
        value = json.loads(text.strip() or "{}")
    except RecursionError as error:
        raise InvalidRequest(
            "messages", f"{which}: the arguments of a tool call are nested too deep"
        ) from error
    except ValueError:
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text


class _Room:
    """Room for the values in the arguments of all calls, counted before they are made."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._values = 0

    def take(self, which: str, text: str) -> None:
        """Take up what arguments need that come as JSON.

        Raises:
            InvalidRequest: there is no room.
        """
        if self._limits.values is None:
            return
        # At least as many values as there are of these outside of strings; and a string is a value,
        # or the key of one, so that not all of a million have to be found.
        left = max(0, self._limits.values - self._values)
        bare, strings = _STRING.subn("", text, count=2 * left + 2)
        others = sum(map(bare.count, ",[{")) - bare.count("[]") - bare.count("{}")
        self._values += max(strings // 2, others)
        of = f"{which}: with its tool calls, the conversation"
        self._limits.check("messages", "values", self._values, "values", of=of, least=True)
