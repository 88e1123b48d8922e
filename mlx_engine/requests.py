"""Requests as a caller makes them: a prompt or a chat, and how to answer it. Only values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

from mlx_engine.checks import (
    LARGEST,
    checked_time_limit,
    checked_wait,
    flag,
    integer,
    integer_or_none,
    shown,
    unknown_option,
)
from mlx_engine.conversation import Message as Message
from mlx_engine.conversation import checked_messages, checked_tools, name_of_tool
from mlx_engine.errors import InvalidRequest
from mlx_engine.limits import DEFAULT_LIMITS, RequestLimits
from mlx_engine.outputs import GenerationResult, ProgressCallback
from mlx_engine.params import SamplingOptions, SamplingParams
from mlx_engine.strategies import EngineDefault, SpecPrefill

# A mapping names the one tool to call: {"type": "function", "function": {"name": "f"}}.
ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]


# Text, token ids, or the messages of a chat.
Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any] | GenerationResult]


class ChatOptions(TypedDict, total=False):
    """Keyword arguments that are about a chat, of ``chat``, ``stream_chat``, ``count_tokens`` and
    ``render_chat``; ``Engine.chat`` explains them.
    """

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    thinking: bool | None
    max_reasoning_tokens: int | None
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


class AnswerOptions(TypedDict, total=False):
    """Keyword arguments that are about how an answer is made, of all that make answers;
    ``Engine.generate`` explains them.
    """

    output: Any
    timeout: float | None
    max_wait: float | None
    priority: int
    prefill: SpecPrefill | EngineDefault | None
    decode: EngineDefault | None
    on_progress: ProgressCallback | None


class RequestOptions(AnswerOptions, SamplingOptions, total=False):
    """All keyword arguments of ``generate`` and ``stream_generate``."""


class ChatRequestOptions(ChatOptions, RequestOptions, total=False):
    """All keyword arguments of ``chat``, ``stream_chat``, ``map`` and ``generate_batch``."""


CHAT_DEFAULTS: ChatOptions = {
    "tools": None,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "thinking": None,
    "max_reasoning_tokens": None,
    "continue_final_message": False,
    "chat_template_kwargs": None,
}
ANSWER_DEFAULTS: AnswerOptions = {
    "output": None,
    "timeout": None,
    "max_wait": None,
    "priority": 0,
    "prefill": "default",
    "decode": "default",
    "on_progress": None,
}
ALL_DEFAULTS: Mapping[str, Any] = {**CHAT_DEFAULTS, **ANSWER_DEFAULTS}


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
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            raise InvalidRequest("prompt", "these are messages: give them to chat()")
        return cls(prompt)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        given = self.prompt  # NumPy's strings have a type of their own
        prompt = str(given) if isinstance(given, str) else _token_ids(given)
        object.__setattr__(self, "prompt", prompt)
        if len(self.prompt) == 0:
            raise InvalidRequest("prompt", "must not be empty")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, and what of it is wanted.

    Attributes:
        messages: in one form, made of what OpenAI's API takes: ``content`` is text, and arguments
            of calls are mappings, or the text that they are where that is no JSON.
        tools: descriptions of tools; ``None`` if there are none.
        template_kwargs: for the chat template.
        thinking: whether to reason first; ``None`` leaves it to the chat template.
        max_reasoning_tokens: after so many tokens reasoning is closed, and the answer goes on;
            ``None`` for no limit of its own.
        continue_final_message: whether to go on with the last message, which is the assistant's.
        tool_choice: whether the model may or must call tools, or the one that it must call.
        parallel_tool_calls: whether it may make more than one call in an answer.
        option: what a caller calls it.

    Raises:
        InvalidRequest: one of them is of the wrong shape.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    thinking: bool | None = None
    max_reasoning_tokens: int | None = None
    continue_final_message: bool = False
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    option: ClassVar[str] = "messages"

    @classmethod
    def of(
        cls,
        messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limits: RequestLimits = DEFAULT_LIMITS,
        *,
        thinking: bool | None = None,
        max_reasoning_tokens: int | None = None,
        continue_final_message: bool = False,
        tool_choice: ToolChoice | None = "auto",
        parallel_tool_calls: bool | None = True,
    ) -> ChatPrompt:
        """Check what a caller has given, and copy it; ``None`` is the default of the last two."""
        copies = checked_messages(messages, limits)
        continued = flag("continue_final_message", continue_final_message)
        if continued:
            _check_continued(copies)
        known = checked_tools(tools, limits)
        return cls(
            copies,
            known,
            _template_kwargs(template_kwargs, limits),
            None if thinking is None else flag("thinking", thinking),
            integer_or_none("max_reasoning_tokens", max_reasoning_tokens, low=0),
            continued,
            _tool_choice(tool_choice, known, limits),
            parallel_tool_calls is None or flag("parallel_tool_calls", parallel_tool_calls),
        )

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model gets to see."""
        return None if self.tool_choice == "none" else self.tools


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, as its caller wants it.

    Attributes:
        source: what to go on from.
        params: how to choose tokens, and when to stop.
        priority: lower goes first.
        prefill, decode: the strategies, as in ``BaseEngine.generate``.
        timeout: seconds that its work may take; ``None`` is no limit.
        max_wait: seconds that it may wait for its turn; ``None`` is no limit but the engine's.
    """

    source: TextPrompt | ChatPrompt
    params: SamplingParams
    priority: int = 0
    prefill: SpecPrefill | EngineDefault | None = "default"
    decode: EngineDefault | None = "default"
    timeout: float | None = None
    max_wait: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "priority", checked_priority(self.priority))
        object.__setattr__(self, "timeout", checked_time_limit(self.timeout))
        object.__setattr__(self, "max_wait", checked_wait(self.max_wait))


def chat_prompt(
    messages: Sequence[Message | Mapping[str, Any] | GenerationResult],
    options: ChatOptions,
    limits: RequestLimits,
) -> ChatPrompt:
    """The chat that a caller has given; others of his options are left alone.

    Raises:
        InvalidRequest: it is not acceptable.
    """
    given = those_of(ChatOptions, options)
    tools, template_kwargs = given.pop("tools", None), given.pop("chat_template_kwargs", None)
    return ChatPrompt.of(messages, tools, template_kwargs, limits, **given)


def generation_request(
    source: TextPrompt | ChatPrompt, params: SamplingParams, options: RequestOptions
) -> GenerationRequest:
    """The request of these parts.

    Raises:
        InvalidRequest: an option is not acceptable.
    """
    given = {**ANSWER_DEFAULTS, **those_of(AnswerOptions, options)}
    names = ("priority", "prefill", "decode", "timeout", "max_wait")
    return GenerationRequest(source, params, *(given[name] for name in names))


def check_known(options: Iterable[str], kind: type[Any], also: Sequence[str] = ()) -> None:
    """See that there are such options.

    Args:
        kind: the ``TypedDict`` that has them.
        also: others that there are.

    Raises:
        InvalidRequest: one is unknown; the message says what to write instead.
    """
    known = kind.__annotations__
    for name in options:
        if name not in known:
            raise unknown_option(name, (*known, *also))


def those_of(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options among these that a ``TypedDict`` has."""
    return {name: options[name] for name in kind.__annotations__ if name in options}


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


def _check_continued(messages: list[dict[str, Any]]) -> None:
    number, last = len(messages) - 1, messages[-1]
    which = f"number {number} ({shown(last['role'])})"
    if last["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message", f"the last message, {which}, is not the assistant's"
        )
    if last.get("tool_calls"):
        raise InvalidRequest(
            "continue_final_message", f"the last message, {which}, has tool calls, and is complete"
        )


def _tool_choice(
    given: object, tools: list[dict[str, Any]] | None, limits: RequestLimits
) -> ToolChoice:
    option = "tool_choice"
    match given:  # only texts are compared: what else there is may fail at that
        case None | str("auto"):
            return "auto"
        case str("none"):
            return "none"
        case str("required"):
            if not tools:
                raise InvalidRequest(option, "'required' needs tools, and there are none")
            return "required"
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            option,
            "must be 'auto', 'none', 'required' or "
            f"{{'type': 'function', 'function': {{'name': ...}}}}, not {shown(given)}",
        )
    return _named_tool(given, tools, limits)


def _named_tool(
    given: Mapping[Any, Any], tools: list[dict[str, Any]] | None, limits: RequestLimits
) -> dict[str, Any]:
    """The choice of one tool, in the form of OpenAI's chats; its responses have the name flat."""
    option = "tool_choice"
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, Mapping) else None
    if given.get("type", "function") != "function" or not isinstance(name, str) or not name:
        raise InvalidRequest(
            option,
            f"must be {{'type': 'function', 'function': {{'name': ...}}}}, not {shown(given)}",
        )
    limits.check_name(option, name)
    names = [name_of_tool(tool) for tool in tools or ()]
    if name not in names:
        there = f"there are {', '.join(map(str, names)):.400}" if names else "there are no tools"
        raise InvalidRequest(option, f"there is no tool {shown(name)}; {there}")
    return {"type": "function", "function": {"name": name}}


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


def _is_mlx_array(value: object) -> bool:
    # Reading it would be MLX work, and this is not the MLX thread.
    return type(value).__module__.partition(".")[0] == "mlx"


def _is_vector(value: object) -> bool:
    return getattr(value, "ndim", None) == 1
