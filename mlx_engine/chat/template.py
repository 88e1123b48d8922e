"""A model's chat template: conversations -> prompts, byte for byte what transformers makes."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

from mlx_engine.chat.answer_grammar import bound_answer, is_bound
from mlx_engine.chat.attempts import Attempts
from mlx_engine.chat.bound_answer import BoundAnswer
from mlx_engine.chat.continuation import continued
from mlx_engine.chat.formats import AnswerFormat, choose_format
from mlx_engine.chat.messages import Adapted
from mlx_engine.chat.offered_tools import check_shown
from mlx_engine.chat.parser import AnswerParser
from mlx_engine.chat.probes import Probes
from mlx_engine.chat.renderer import Messages, Renderer, Tools
from mlx_engine.chat.shown import end_of, missing, note_of
from mlx_engine.chat.stand_ins import key_of, stand_ins
from mlx_engine.chat.switches import switch_thinking
from mlx_engine.constraints import Constraint
from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import InvalidRequest
from mlx_engine.requests import ChatPrompt, ToolChoice

_VARIANTS = 32  # of tools or none, and of variables, that are remembered for a template
_TAIL = 64  # characters in which a prompt's end is looked for where it cannot be told apart
# Other names of reasoning, as an attribute of a message.
_FIELDS = {
    "thinking": re.compile(r"[.\['\"]thinking\b"),
    "reasoning": re.compile(r"[.\['\"]reasoning\b"),
}


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation in the form that the model gets.

    Attributes:
        text: the prompt.
        prefix: what the template has written behind the last message; of one that is continued,
            its beginning too.
        notes: what is in another way than asked, one sentence each.
        format: how the model's answers are written.
        tools: those that the model may call.
        parallel: whether it may make more than one call.
        messages: the conversation as the template has got it.
        variables: what the template has got besides.
        end: characters before the generation prompt; ``None`` if that cannot be told apart.
        render: puts other messages into the template in the same way, without a generation
            prompt; raises anything.
        tool_choice: which tools the model may or must call.
        bound: how the answer is written, once a grammar binds it; see ``bind``.
    """

    text: str
    prefix: str
    notes: tuple[str, ...]
    format: AnswerFormat
    tools: Tools
    parallel: bool
    messages: Messages
    variables: dict[str, Any]
    end: int | None
    render: Callable[[Messages], str]
    tool_choice: ToolChoice = "auto"
    bound: BoundAnswer | None = None

    def bind(
        self, constraint: Constraint | None, special: Callable[[], Mapping[str, int]]
    ) -> RenderedPrompt:
        """The same prompt, for an answer that ``bound.lark`` binds, if anything does.

        Args:
            constraint: on the content of the answer; its calls are bound by the tools.
            special: gives the ids of the tokenizer's special tokens by their texts, if they are
                needed; see ``bound_answer``. Those that end an answer are none of them.

        Raises:
            InvalidRequest: the answer cannot be bound so in this model's format.
        """
        if not is_bound(constraint, self.tools, self.tool_choice):
            return self
        bound = bound_answer(
            self.format,
            self.prefix,
            constraint=constraint,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel=self.parallel,
            special=special(),
        )
        return replace(self, bound=bound)

    def reasoning_close(self) -> str:
        """The text that ends reasoning so that the answer goes on; empty if there is none."""
        if self.bound is not None:
            return self.bound.reasoning_close()
        return self.format.reasoning_close()

    def parser(self) -> AnswerParser:
        """A parser for an answer to it."""
        return AnswerParser(
            self.format, self.tools, self.prefix, parallel=self.parallel, bound=self.bound
        )


class ChatTemplate:
    """The chat template of one tokenizer. From any thread.

    Args:
        tokenizer: mlx_lm's wrapper, which is not kept.
        tool_format, reasoning_format: a user's choice of how the model's answers are written.
    """

    def __init__(
        self, tokenizer: Any, tool_format: object = None, reasoning_format: object = None
    ) -> None:
        self._renderer = Renderer(tokenizer)
        self._chosen = tool_format, reasoning_format
        self._response_template = getattr(tokenizer, "response_template", None)
        self._special = tuple(tokenizer.get_added_vocab())
        self._variants: OrderedDict[tuple[bool, str], Probes] = OrderedDict()

    @classmethod
    def of(
        cls, tokenizer: Any, tool_format: object = None, reasoning_format: object = None
    ) -> ChatTemplate:
        """The one of a tokenizer, which remembers what it has found out about its template.

        Args:
            tool_format, reasoning_format: given when a model is loaded; ``None`` is what was
                given then.
        """
        current = tokenizer.chat_template
        with _lock:
            text, known = _templates.get(tokenizer, (None, None))
        chosen = tool_format, reasoning_format
        if known is not None:
            chosen = known._chosen if chosen == (None, None) else chosen
            if text == current and chosen == known._chosen:
                return known
        template = cls(tokenizer, *chosen)
        with _lock:
            _templates[tokenizer] = current, template
        return template

    @cached_property
    def format(self) -> AnswerFormat:
        """How the model writes reasoning and calls."""
        templates: Any = self._renderer.templates
        if not self._renderer.is_template:  # what it makes of a conversation has its markers
            templates = "".join(self._probes(tools, {}).sample for tools in (False, True))
        elif len(templates) == 1:
            (templates,) = templates.values()
        tool_format, reasoning_format = self._chosen
        return choose_format(
            templates or None,
            response_template=self._response_template,
            tool_format=tool_format,
            reasoning_format=reasoning_format,
            special_tokens=self._special,
        )

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the model is shown its tools, in a conversation with or without instructions."""
        probes = self._probes(True, {})
        return probes.shows_tools(False) or probes.shows_tools(True)

    def render(self, prompt: ChatPrompt) -> RenderedPrompt:
        """The prompt that a conversation becomes.

        Raises:
            InvalidRequest: the template refuses it, or does not show its tools.
            Interrupted: it should stop, and did between two steps.
        """
        variables, notes = self._variables(prompt)
        probes = self._probes(bool(prompt.offered), variables)
        fields = self._reasoning_fields(prompt)
        attempts = Attempts(self._renderer, probes, prompt, variables, fields)
        adapted, tools, begun = attempts.render()
        text = begun
        if prompt.continue_final_message:
            text = self._continue(attempts, adapted, tools, begun)
        notes += adapted.notes
        notes += self._unseen(probes, adapted, tools, text)
        prefix, end = self._end(prompt, probes, adapted, text, begun)
        return RenderedPrompt(
            text=text,
            prefix=prefix,
            notes=tuple(notes),
            format=self.format,
            tools=tools,
            parallel=prompt.parallel_tool_calls,
            tool_choice=prompt.tool_choice,
            messages=adapted.messages,
            variables=variables,
            end=end,
            render=partial(
                self._renderer.render, tools=tools, variables=variables, generation=False
            ),
        )

    def _unseen(self, probes: Probes, adapted: Adapted, tools: Tools, text: str) -> list[str]:
        """Notes on what of the conversation and its tools does not show in the prompt."""
        notes: list[str] = []
        calls = any(entry.calls for entry in adapted.entries)
        if tools:
            first = adapted.entries[0]
            known = "tools" in first.message or probes.shows_tools(first.role == "system")
            notes += check_shown(tools, text, known, begun=calls)
            if not self.format.has_calls:
                notes.append(
                    "tools: no format is known for this model's tool calls, which come as text; "
                    "the engine's option tool_format names one"
                )
        shows = (probes.shows_calls, probes.shows_results) if calls else (True, True)
        if lost := missing(text, adapted.entries, *shows):
            notes.append(note_of(lost))
        return notes

    def _variables(self, prompt: ChatPrompt) -> tuple[dict[str, Any], list[str]]:
        """Variables for the template, and notes on those that it does not read."""
        tools = bool(prompt.offered)
        names = self._renderer.names(tools)
        given = {name: value for name, value in prompt.template_kwargs.items() if name in names}
        notes = []
        if unread := [name for name in prompt.template_kwargs if name not in names]:
            notes.append(
                f"chat_template_kwargs: this chat template does not look at {', '.join(unread)}"
            )
        if prompt.thinking is None:
            return given, notes
        switched, note = switch_thinking(
            prompt.thinking,
            names,
            self._renderer.source(tools),
            given,
            self.format.has_reasoning,
            lambda variables: self._probes(tools, variables).plain,
        )
        return {**switched, **given}, notes + ([note] if note else [])

    def _probes(self, tools: bool, variables: Mapping[str, Any]) -> Probes:
        """Traits of the template, with variables that are like these."""
        alike = stand_ins(variables, self._renderer.source(tools))
        key = tools, key_of(alike)
        with _lock:
            if key in self._variants:
                self._variants.move_to_end(key)
                return self._variants[key]
            probes = self._variants[key] = Probes(self._renderer, tools, alike)
            while len(self._variants) > _VARIANTS:
                self._variants.popitem(last=False)
        return probes

    def _reasoning_fields(self, prompt: ChatPrompt) -> tuple[str, ...]:
        source = self._renderer.source(bool(prompt.offered))
        others = [name for name, pattern in _FIELDS.items() if pattern.search(source)]
        return ("reasoning_content", *others)

    def _continue(self, attempts: Attempts, adapted: Adapted, tools: Tools, begun: str) -> str:
        """The prompt that ends in the last message: as the template has it, or behind a header.

        Args:
            begun: the prompt for an answer in the place of that message.
        """
        render = partial(
            self._renderer.render, tools=tools, variables=attempts.variables, generation=False
        )
        last = adapted.messages[-1]
        try:
            return continued(adapted.messages, attempts.fields, render)
        except Interrupted:
            raise
        except Exception as error:
            if len(adapted.messages) == 1:
                raise InvalidRequest(
                    "continue_final_message", f"the model's chat template refuses it: {error}"
                ) from error
            thought = next((last[name] for name in attempts.fields if name in last), "")
            return self._behind_header(begun, str(thought), adapted)

    def _behind_header(self, begun: str, thought: str, adapted: Adapted) -> str:
        """The last message behind the header of an answer, as the family writes it."""
        content = str(adapted.messages[-1]["content"])
        form = self.format.reasoning
        is_open = AnswerParser(self.format, None, begun[-_TAIL:]).in_reasoning
        if not thought and not is_open:
            return f"{begun}{content}"
        if form is None:
            raise InvalidRequest(
                "continue_final_message",
                f"this model's chat template does not show the reasoning of {_last(adapted)}",
            )
        close = self.format.reasoning_close() if content else ""
        return f"{begun}{'' if is_open else form.open}{thought}{close}{content}"

    def _end(
        self, prompt: ChatPrompt, probes: Probes, adapted: Adapted, text: str, begun: str
    ) -> tuple[str, int | None]:
        """The text behind the last message, and where the generation prompt begins."""
        entries = adapted.entries
        goes_on = prompt.continue_final_message and len(entries) > 1
        last = entries[-2 if goes_on else -1]
        generation = probes.generation_prompt(last.role)
        end: int | None = None
        if generation and begun.endswith(generation):
            end = len(begun) - len(generation)
        elif generation == "":
            end = len(begun)
        if not prompt.continue_final_message:
            if generation and end is not None:
                return generation, end
            behind = end_of(text, last)
            return text[-_TAIL:] if behind is None else text[behind:], end
        if not goes_on:
            return text, len(text)
        if generation and end is not None and text.startswith(begun[:end]):
            return text[end:], len(text)
        behind = end_of(text[: len(text) - len(adapted.messages[-1]["content"])], last)
        return text[-_TAIL:] if behind is None else text[behind:], len(text)


def _last(adapted: Adapted) -> str:
    return str(adapted.entries[-1].sources[-1])


# Of each tokenizer: the template that it had then, and what is known of that.
_templates: WeakKeyDictionary[Any, tuple[object, ChatTemplate]] = WeakKeyDictionary()
_lock = threading.Lock()  # never held while a template is at work
