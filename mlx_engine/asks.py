"""What a caller asks of an engine: a prompt or a chat, and how to answer it. Only values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mlx_engine.config import AsEngine, SpecPrefill
from mlx_engine.errors import InvalidRequest
from mlx_engine.params import SamplingParams


class TokenIds(list[int]):
    """Token ids of which each is known to be one: a prompt may have a million of them."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A plain prompt.

    Attributes:
        prompt: text, or a list of token ids; anything that counts as such is made into one.

    Raises:
        InvalidRequest: it is empty or of another type.
    """

    prompt: str | list[int]

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

    Raises:
        InvalidRequest: one of them is of the wrong shape.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Check what a caller has given, and copy it."""
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise InvalidRequest(
                "messages", "must be a list of messages such as {'role': 'user', 'content': 'Hi'}"
            )
        if not messages:
            raise InvalidRequest("messages", "must not be empty")
        copies = [_message(index, message) for index, message in enumerate(messages)]
        if tools is not None:
            if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
                raise InvalidRequest("tools", "must be a list of tool descriptions (JSON schema)")
            for tool in tools:
                if not isinstance(tool, Mapping):
                    raise InvalidRequest("tools", f"each must be a mapping, not {tool!r}")
        if template_kwargs is not None and not (
            isinstance(template_kwargs, Mapping)
            and all(isinstance(name, str) for name in template_kwargs)
        ):
            raise InvalidRequest("chat_template_kwargs", "must map names to values")
        kwargs = dict(template_kwargs or {})
        for name in _OURS & kwargs.keys():
            raise InvalidRequest("chat_template_kwargs", f"{name!r} is set by the engine")
        return cls(copies, [dict(tool) for tool in tools] if tools else None, kwargs)


@dataclass(frozen=True, slots=True)
class Ask:
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
    prefill: SpecPrefill | AsEngine | None = "as engine"
    decode: AsEngine | None = "as engine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "priority", checked_priority(self.priority))


_OURS = {"tools", "tokenize", "add_generation_prompt", "return_dict", "messages", "conversation"}


def checked_priority(priority: int) -> int:
    """``priority``, if it can be one; raises ``InvalidRequest`` if not."""
    if not isinstance(priority, Integral) or isinstance(priority, bool):
        raise InvalidRequest("priority", f"must be an integer, not {priority!r}")
    return int(priority)


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
    if tokens and {type(token) for token in tokens} == {int} and min(tokens) >= 0:
        return tokens  # at once, since prompts may have a million of them
    for token in tokens:
        if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
            raise InvalidRequest("prompt", f"{token!r} is not a token id")
    return [int(token) for token in tokens]


def _message(index: int, message: object) -> dict[str, Any]:
    """A copy of a message in the form that templates expect, from the form that OpenAI has."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(
            "messages", f"number {index} must be a mapping with a 'role', not {message!r}"
        )
    copy = dict(message)
    content = copy.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise InvalidRequest("messages", f"number {index}: only text parts are supported")
            parts.append(str(part.get("text", "")))
        copy["content"] = "".join(parts)
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest("messages", f"number {index}: 'content' must be text")
    elif content is None and not copy.get("tool_calls"):
        raise InvalidRequest("messages", f"number {index} has no 'content'")
    if copy.get("tool_calls"):
        if not isinstance(copy["tool_calls"], Sequence) or isinstance(copy["tool_calls"], str):
            raise InvalidRequest("messages", f"number {index}: 'tool_calls' must be a list")
        copy["tool_calls"] = [_past_call(index, call) for call in copy["tool_calls"]]
    return copy


def _past_call(index: int, call: object) -> object:
    """A call of an earlier turn; templates want its arguments as a mapping, not as JSON."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except json.JSONDecodeError as error:
                raise InvalidRequest(
                    "messages", f"number {index}: the arguments of a tool call are not JSON"
                ) from error
        return {**call, "function": function}
    return call


def _is_mlx_array(value: object) -> bool:
    # Reading it would be MLX work, and this is not the MLX thread.
    return type(value).__module__.partition(".")[0] == "mlx"


def _is_vector(value: object) -> bool:
    return getattr(value, "ndim", None) == 1
