"""Prompts and chats -> token ids."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import jinja2
import jinja2.meta
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.errors import ContextLengthExceeded, InvalidRequest
from mlx_engine.models.loading import LoadedModel

# Unicode normalisation in a tokenizer may shorten text, though never by more than this.
_SHRINK = 4
# Where a chat template's own last marker is looked for when it cannot be told apart.
_TAIL_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the model gets it.

    Attributes:
        tokens: token ids, at least one.
        initial_state: state of mlx_lm's text state machine in which the answer begins;
            ``None`` if the answer is raw text.
        notes: what was asked for and had no effect.
    """

    tokens: list[int]
    initial_state: str | None = None
    notes: tuple[str, ...] = ()


class Input(Protocol):
    """What a request asks the model to go on from."""

    @property
    def option(self) -> str:
        """What its user calls it."""

    @property
    def tools(self) -> Sequence[Any] | None:
        """Tools that the model was told of."""

    def encode(self, loaded: LoadedModel) -> Encoded:
        """Turn it into token ids, on the MLX thread."""


class TextInput:
    """A plain prompt: text, or token ids.

    Raises:
        InvalidRequest: it is empty or of another type.
    """

    option = "prompt"
    tools: Sequence[Any] | None = None

    def __init__(self, prompt: str | Sequence[int]) -> None:
        self._prompt: str | list[int]
        if isinstance(prompt, str):
            self._prompt = prompt
        elif _is_mlx_array(prompt) or not (isinstance(prompt, Sequence) or _is_vector(prompt)):
            raise InvalidRequest(
                "prompt",
                f"must be a string or a list of token ids, not {type(prompt).__name__}"
                + ("; use prompt.tolist()" if hasattr(prompt, "tolist") else ""),
            )
        elif isinstance(prompt, bytes | bytearray):
            raise InvalidRequest("prompt", "must be a string, not bytes; decode it first")
        else:
            for token in prompt:
                if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
                    raise InvalidRequest("prompt", f"{token!r} is not a token id")
            self._prompt = [int(token) for token in prompt]
        if len(self._prompt) == 0:
            raise InvalidRequest("prompt", "must not be empty")

    def encode(self, loaded: LoadedModel) -> Encoded:
        """The token ids; a string gets the tokenizer's special tokens unless it has them.

        Raises:
            InvalidRequest: a token id is not in the vocabulary.
            ContextLengthExceeded: the text is too long, by far.
        """
        prompt = self._prompt
        if isinstance(prompt, str):
            check_text(prompt, loaded, self.option)
            bos = loaded.tokenizer.bos_token
            special = bos is None or not prompt.startswith(bos)
            tokens: list[int] = loaded.tokenizer.encode(prompt, add_special_tokens=special)
            if not tokens:
                raise InvalidRequest("prompt", "has no tokens in this model's vocabulary")
            return Encoded(tokens)
        for token in prompt:
            if token >= loaded.vocab_size:
                raise InvalidRequest(
                    "prompt",
                    f"token id {token} is not in the vocabulary of {loaded.vocab_size} tokens",
                )
        return Encoded(prompt)


class ChatInput:
    """A conversation, for the model's chat template.

    Raises:
        InvalidRequest: an argument is of the wrong shape.
    """

    option = "messages"

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise InvalidRequest(
                "messages", "must be a list of messages such as {'role': 'user', 'content': 'Hi'}"
            )
        if not messages:
            raise InvalidRequest("messages", "must not be empty")
        self._messages = [_message(index, message) for index, message in enumerate(messages)]
        if tools is not None:
            if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
                raise InvalidRequest("tools", "must be a list of tool descriptions (JSON schema)")
            for tool in tools:
                if not isinstance(tool, Mapping):
                    raise InvalidRequest("tools", f"each must be a mapping, not {tool!r}")
        self.tools: Sequence[Any] | None = [dict(tool) for tool in tools] if tools else None
        if template_kwargs is not None and not (
            isinstance(template_kwargs, Mapping)
            and all(isinstance(name, str) for name in template_kwargs)
        ):
            raise InvalidRequest("chat_template_kwargs", "must map names to values")
        self._kwargs = dict(template_kwargs or {})
        for name in _OURS & self._kwargs.keys():
            raise InvalidRequest("chat_template_kwargs", f"{name!r} is set by the engine")

    def encode(self, loaded: LoadedModel) -> Encoded:
        """The conversation in the model's template, up to where the answer begins.

        Raises:
            InvalidRequest: the model has no chat template, or it refuses the conversation,
                or does not know of tools.
            ContextLengthExceeded: the text is too long, by far.
        """
        tokenizer = loaded.tokenizer
        if not tokenizer.has_chat_template:
            raise InvalidRequest(
                "messages",
                "this model's tokenizer has no chat template; use generate() with a prompt "
                "in the form that the model was trained on",
            )
        text = self._render(tokenizer)
        check_text(text, loaded, self.option)
        notes: list[str] = []
        if self.tools and text == self._render(tokenizer, tools=None):
            raise InvalidRequest(
                "tools",
                "this model's chat template does not show tools to it (some do only if there is "
                "a system message)",
            )
        if self.tools and not tokenizer.has_tool_calling:
            notes.append("tools: mlx-lm has no parser for this model's tool calls; see the text")
        if unknown := [name for name in self._kwargs if not self._matters(tokenizer, name, text)]:
            names = ", ".join(unknown)
            notes.append(f"chat_template_kwargs: this chat template does not look at {names}")
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise InvalidRequest("messages", "the chat template made an empty prompt of them")
        return Encoded(tokens, self._initial_state(tokenizer, text, tokens), tuple(notes))

    def _render(
        self,
        tokenizer: TokenizerWrapper,
        *,
        tools: Any = ...,
        kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    self._messages,
                    tools=self.tools if tools is ... else tools,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **(self._kwargs if kwargs is None else kwargs),
                )
            )
        except Exception as error:
            raise InvalidRequest(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error

    def _matters(self, tokenizer: TokenizerWrapper, name: str, text: str) -> bool:
        """Whether the template looks at an option, as far as that can be known."""
        template = tokenizer.chat_template
        if isinstance(template, str) and (names := _names_in(template)) is not None:
            return name in names
        others = {key: value for key, value in self._kwargs.items() if key != name}
        return text != self._render(tokenizer, kwargs=others)

    def _initial_state(self, tokenizer: TokenizerWrapper, text: str, tokens: list[int]) -> str:
        """Whether the answer begins as reasoning: the template may have opened it."""
        if tokenizer.response_initial_state is not None:
            return str(tokenizer.response_initial_state)
        if not tokenizer.has_thinking:
            return "normal"
        # Markers in what a user wrote do not count, so only the template's own end does.
        before = self._render(tokenizer, add_generation_prompt=False)
        if text.startswith(before):
            tail = text[len(before) :]
        else:
            tail = str(tokenizer.decode(tokens[-_TAIL_TOKENS:]))
        opened, closed = tail.rfind(tokenizer.think_start), tail.rfind(tokenizer.think_end)
        return "reasoning" if opened > closed else "normal"


_OURS = {"tools", "tokenize", "add_generation_prompt", "return_dict", "messages", "conversation"}


@functools.lru_cache(maxsize=16)
def _names_in(template: str) -> frozenset[str] | None:
    """The variables that a template takes from outside; ``None`` if Jinja cannot tell."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError:  # it has tags of its own
        return None


def check_text(text: str, loaded: LoadedModel, option: str) -> None:
    """Refuse text that cannot fit, without tokenizing megabytes of it first, or is no text.

    Raises:
        ContextLengthExceeded: even in the longest tokens it would not fit.
        InvalidRequest: it has surrogates, as bytes that are no UTF-8 become in arguments.
    """
    limit = loaded.context_length
    if limit is not None and len(text) > _SHRINK * limit * loaded.longest_token:
        raise ContextLengthExceeded(
            f"{len(text)} characters of {option} cannot fit into the model's context of {limit} "
            "tokens; shorten it",
            prompt_tokens=None,
            max_tokens=None,
            context_length=limit,
            option=option,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(option, f"is not valid Unicode text ({error})") from error


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
