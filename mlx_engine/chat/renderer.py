"""The model's own renderer of conversations: a template, or a function in the place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlx_engine.chat.template_names import names_in, names_of
from mlx_engine.core.stop import Interrupted, checkpoint

_WORD = "ivory17"
_OTHER_TOOLS = "xml_tools"  # the name by which SmolLM3 knows tools
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


class Renderer:
    """The renderer of one tokenizer, byte for byte what transformers makes. From any thread.

    Args:
        tokenizer: mlx_lm's wrapper, which is not kept.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer._tokenizer
        self._function = tokenizer._chat_template
        self._thinking_name = tokenizer._thinking_kwarg  # of a renderer that has another
        kind = type(self._inner)
        own = getattr(kind, "apply_chat_template", None)
        self._own = None if own is PreTrainedTokenizerBase.apply_chat_template else own
        self.templates = named_templates(getattr(self._inner, "chat_template", None))
        self._parts: dict[bool, bool] = {}  # whether texts are given in parts, by whether tools are

    @property
    def is_template(self) -> bool:
        """Whether it is a template, whose text can be looked at."""
        return self._function is None and self._own is None

    def source(self, tools: bool) -> str:
        """The text of the template that is used with tools, or without; empty for a function."""
        return self._chosen(tools) or "" if self.is_template else ""

    def names(self, tools: bool) -> frozenset[str]:
        """The variables that it reads."""
        function = self._function or self._own
        if function is None:
            return names_in(self.source(tools))
        names = names_of(function)
        return names | {"enable_thinking"} if self._thinking_name in names else names

    def render(
        self,
        messages: Messages,
        tools: Tools,
        variables: Mapping[str, Any],
        *,
        generation: bool = True,
    ) -> str:
        """The text of a conversation; messages with text as ``content``.

        Args:
            generation: whether to end it where an answer begins.

        Raises:
            Interrupted: it should stop.
            Exception: whatever the renderer raises.
        """
        if self._wants_parts(bool(tools)):
            messages = [_in_parts(message) for message in messages]
        return self._render(messages, tools, variables, generation)

    def _render(
        self, messages: Messages, tools: Tools, variables: Mapping[str, Any], generation: bool
    ) -> str:
        checkpoint()
        given: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": generation,
            **variables,
        }
        if tools and _OTHER_TOOLS not in given and _OTHER_TOOLS in self.names(tools=True):
            given[_OTHER_TOOLS] = tools
        if self._function is not None:
            return str(self._function(messages, **given))
        if self._own is not None and self._thinking_name != "enable_thinking":
            if "enable_thinking" in given:
                given[self._thinking_name] = given.pop("enable_thinking")
        elif isinstance(getattr(self._inner, "chat_template", None), Mapping | list | tuple):
            given["chat_template"] = self._chosen(bool(tools))
        return str(
            self._inner.apply_chat_template(messages, tokenize=False, return_dict=False, **given)
        )

    def attempt(
        self,
        messages: Messages,
        tools: Tools,
        variables: Mapping[str, Any],
        *,
        generation: bool = True,
    ) -> str | None:
        """The text as ``render`` has it; ``None`` if the conversation is refused."""
        try:
            return self.render(messages, tools, variables, generation=generation)
        except Interrupted:
            raise
        except Exception:  # noqa: BLE001 - a template raises anything
            return None

    def _wants_parts(self, tools: bool) -> bool:
        """Whether it shows a text only as a list of parts, as some that take images do."""
        if not self.is_template:
            return False
        if tools not in self._parts:
            said: Messages = [{"role": "user", "content": _WORD}]
            self._parts[tools] = not self._has_word(said) and self._has_word(
                [_in_parts(message) for message in said]
            )
        return self._parts[tools]

    def _has_word(self, messages: Messages) -> bool:
        try:
            return _WORD in self._render(messages, None, {}, generation=True)
        except Interrupted:
            raise
        except Exception:  # noqa: BLE001 - a template raises anything
            return False

    def _chosen(self, tools: bool) -> str | None:
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.templates.get("default") or next(iter(self.templates.values()), None)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def named_templates(given: object) -> dict[str, str]:
    """Templates by name, of a tokenizer that has one, or several in a mapping or a list."""
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, Mapping):
        return {str(name): str(text) for name, text in given.items()}
    if isinstance(given, Sequence):
        return {
            str(each.get("name")): str(each.get("template"))
            for each in given
            if isinstance(each, Mapping)
        }
    return {}
