"""Requests as a caller makes them: a prompt or a chat, and how to answer it. Only values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Required, TypedDict

from mlx_engine.checks import LARGEST, integer, shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.params import SamplingParams
from mlx_engine.strategies import EngineDefault, SpecPrefill


class Message(TypedDict, total=False):
    """A message of a chat, as in OpenAI's API: what ``list[Message]`` holds for type checkers.

    Attributes:
        role: of the speaker; chat templates know ``system``, ``user``, ``assistant`` and ``tool``.
        content: text, or a list of parts of it, ``{"type": "text", "text": ...}``; ``None`` in a
            message that has only calls.
        name: of the speaker, or of the tool.
        tool_calls: of an assistant: ``{"function": {"name": ..., "arguments": ...}}``, and an
            ``id``.
        tool_call_id: of a tool: which call it answers.
        reasoning_content: of an assistant: what it thought aloud.
    """

    role: Required[str]
    content: str | Sequence[Mapping[str, Any]] | None
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    reasoning_content: str


class TokenIds(list[int]):
    """Token ids of which each is known to be one: a prompt may have a million of them."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A plain prompt.

    Attributes:
        prompt: text, or a list of token ids; anything that counts as such is made into one.
        option: what a caller calls it.

    Raises:
        InvalidRequest: it is empty or of another type.
    """

    prompt: str | list[int]
    option: ClassVar[str] = "prompt"

    @classmethod
    def of(cls, prompt: object, limits: RequestLimits = DEFAULT_LIMITS) -> TextPrompt:
        """Check what a caller has given, and copy it."""
        limits.check_prompt(prompt)
        return cls(prompt)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        given = self.prompt  # NumPy's strings have a type of their own
        prompt = str(given) if isinstance(given, str) else _token_ids(given)
        object.__setattr__(self, "prompt", prompt)
        if len(self.prompt) == 0:
            raise InvalidRequest("prompt", "must not be empty")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation.

    Attributes:
        messages: as templates expect them, made from what OpenAI's API takes.
        tools: descriptions of tools; ``None`` if there are none.
        template_kwargs: for the chat template.
        max_reasoning_tokens: after how many tokens reasoning is closed, and the answer goes on;
            ``None`` is without limit.
        option: what a caller calls it.

    Raises:
        InvalidRequest: one of them is of the wrong shape.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    max_reasoning_tokens: int | None = None
    option: ClassVar[str] = "messages"

    @classmethod
    def of(
        cls,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limits: RequestLimits = DEFAULT_LIMITS,
    ) -> ChatPrompt:
        """Check what a caller has given, and copy it."""
        return cls(
            _messages(messages, limits),
            _tools(tools, limits),
            _template_kwargs(template_kwargs, limits),
        )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, as its caller wants it.

    Attributes:
        source: what to go on from.
        params: how to choose tokens, and when to stop.
        priority: lower goes first.
        prefill, decode: the strategies, as in ``BaseEngine.generate``.
    """

    source: TextPrompt | ChatPrompt
    params: SamplingParams
    priority: int = 0
    prefill: SpecPrefill | EngineDefault | None = "default"
    decode: EngineDefault | None = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "priority", checked_priority(self.priority))


def checked_priority(priority: int, taken: bool = True) -> int:
    """``priority``, if it can be one; raises ``InvalidRequest`` if not.

    Args:
        taken: whether the engine has an order of its own; if not, 0 is all that it takes.
    """
    number = integer("priority", priority, low=-LARGEST)
    if number and not taken:
        raise InvalidRequest(
            "priority",
            "an engine that does one request after another serves them in the order of arrival; "
            "leave it out, or use BatchedEngine",
        )
    return number


def _token_ids(prompt: object) -> list[int]:
    if isinstance(prompt, TokenIds):
        return prompt
    if isinstance(prompt, bytes | bytearray):
        raise InvalidRequest("prompt", "must be a string, not bytes; decode it first")
    if _is_mlx_array(prompt) or not (isinstance(prompt, Sequence) or _is_vector(prompt)):
        raise InvalidRequest(
            "prompt",
            f"must be a string or a list of token ids, not {type(prompt).__name__}"
            + ("; use prompt.tolist()" if hasattr(prompt, "tolist") else ""),
        )
    tokens: list[Any] = list(prompt)  # type: ignore[call-overload]
    # All at once, since prompts may have a million of them.
    if {type(token) for token in tokens} == {int} and min(tokens) >= 0 and max(tokens) <= LARGEST:
        return tokens
    return [integer("prompt", token, low=0, what="a token id") for token in tokens]


def _messages(messages: object, limits: RequestLimits) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            "messages", "must be a list of messages such as {'role': 'user', 'content': 'Hi'}"
        )
    if not messages:
        raise InvalidRequest("messages", "must not be empty")
    limits.check("messages", "messages", len(messages), "messages")
    messages = list(messages)
    limits.check_values("messages", "text_characters", messages)
    copies = [_message(index, message, limits) for index, message in enumerate(messages)]
    if any(copy.get("tool_calls") for copy in copies):  # with arguments that came as JSON
        limits.check_values("messages", "text_characters", copies)
    return copies


def _message(index: int, message: object, limits: RequestLimits) -> dict[str, Any]:
    """A copy of a message in the form that templates expect, from the form that OpenAI has."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(
            "messages", f"number {index} must be a mapping with a 'role', not {shown(message)}"
        )
    copy = dict(message)
    which = f"number {index} ({shown(message['role'])})"
    limits.check_name("messages", copy["role"], of=which)
    content, calls = copy.get("content"), copy.get("tool_calls")
    if isinstance(content, Sequence) and not isinstance(content, str):
        copy["content"] = "".join(_part(which, part) for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest("messages", f"{which}: 'content' must be text, not {shown(content)}")
    elif content is None and not calls:
        raise InvalidRequest("messages", f"{which} has no 'content'")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise InvalidRequest("messages", f"{which}: 'tool_calls' must be a list")
        limits.check("messages", "tool_calls", len(calls), "tool calls", of=which)
        copy["tool_calls"] = [_past_call(which, call, limits) for call in calls]
    return copy


def _part(which: str, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise InvalidRequest("messages", f"{which}: only text parts are supported")
    if not isinstance(text := part.get("text"), str):
        raise InvalidRequest(
            "messages", f"{which}: the 'text' of a text part must be text, not {shown(text)}"
        )
    return text


def _past_call(which: str, call: object, limits: RequestLimits) -> dict[str, Any]:
    """A call of an earlier turn; templates want its arguments as a mapping, not as JSON."""
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
    limits.check_name("messages", name, of=which)
    copy = dict(function)
    if isinstance(arguments := copy.get("arguments"), str):
        copy["arguments"] = _from_json(which, arguments, limits)
    elif arguments is None:
        copy["arguments"] = {}
    elif not isinstance(arguments, Mapping):
        raise InvalidRequest(
            "messages",
            f"{which}: the arguments of a tool call must be a mapping, or JSON, not "
            f"{shown(arguments)}",
        )
    return {**call, "function": copy}


def _from_json(which: str, text: str, limits: RequestLimits) -> Any:
    # As many values as there are of these, at most, and it costs next to nothing to count them.
    if limits.values is not None and sum(map(text.count, ",[{")) > limits.values:
        bare = _STRING.sub("", text)
        count = sum(map(bare.count, ",[{"))
        limits.check("messages", "values", count, "values", of=f"{which}: a tool call")
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            "messages", f"{which}: the arguments of a tool call are not JSON ({error})"
        ) from error


def _tools(tools: object, limits: RequestLimits) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidRequest("tools", "must be a list of tool descriptions (JSON schema)")
    limits.check("tools", "tools", len(tools), "tools")
    tools = list(tools)
    limits.check_values("tools", "tool_characters", tools)
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequest("tools", f"each must be a mapping, not {shown(tool)}")
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            limits.check_name("tools", name, of=f"number {number}")
    return [dict(tool) for tool in tools] or None


def _template_kwargs(given: object, limits: RequestLimits) -> dict[str, Any]:
    option = "chat_template_kwargs"
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequest(option, f"must map names to values, not be {shown(given)}")
    limits.check(option, "template_kwargs", len(given), "names")
    for name in given:
        if not isinstance(name, str):
            raise InvalidRequest(option, f"must map names to values: {shown(name)} is no name")
        limits.check_name(option, name)
        if name in _OURS:
            raise InvalidRequest(option, f"{name!r} is set by the engine")
    limits.check_values(option, "template_characters", given)
    return dict(given)


# What is no variable of a template's, but says how it is used: or which, and that is a program.
_OURS = {
    "add_generation_prompt",
    "chat_template",
    "conversation",
    "messages",
    "return_dict",
    "tokenize",
    "tools",
}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')


def _is_mlx_array(value: object) -> bool:
    # Reading it would be MLX work, and this is not the MLX thread.
    return type(value).__module__.partition(".")[0] == "mlx"


def _is_vector(value: object) -> bool:
    return getattr(value, "ndim", None) == 1
