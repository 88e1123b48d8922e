"""One conversation, given to a chat template in one way after another until it takes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_engine.chat.messages import Adapted, Entry, Form, adapt
from mlx_engine.chat.offered_tools import completed
from mlx_engine.chat.probes import Probes
from mlx_engine.chat.refusal import refusal
from mlx_engine.chat.renderer import Messages, Renderer, Tools
from mlx_engine.core.stop import Interrupted
from mlx_engine.requests import ChatPrompt


@dataclass(frozen=True, slots=True)
class Attempts:
    """The ways in which a template may take a conversation.

    Attributes:
        renderer: of the model.
        probes: what is known of its template.
        prompt: the conversation.
        variables: for the template.
        fields: under which it reads reasoning.
    """

    renderer: Renderer
    probes: Probes
    prompt: ChatPrompt
    variables: dict[str, Any]
    fields: tuple[str, ...]

    def render(self) -> tuple[Adapted, Tools, str]:
        """The conversation in the first way that is taken, the tools, and the prompt.

        The prompt of one whose last message is continued is that of what is before it.

        Raises:
            InvalidRequest: none is taken.
            Interrupted: it should stop.
        """
        refused: Exception | None = None
        seen: list[tuple[Messages, Tools]] = []
        for form, tools in self._ways():
            adapted = self._adapted(form, tools)
            if (adapted.messages, tools) in seen:
                continue
            seen.append((adapted.messages, tools))
            try:
                text = self.renderer.render(self._rendered(adapted), tools, self.variables)
            except Interrupted:
                raise
            except Exception as error:  # noqa: BLE001 - a template raises anything
                refused = refused or error
            else:
                return adapted, tools, text
        assert refused is not None
        first = self._adapted(Form(), self.prompt.offered)
        takes = partial(self.renderer.attempt, tools=self.prompt.offered, variables=self.variables)
        raise refusal(refused, first.entries, lambda some: takes(some) is not None) from refused

    def _adapted(self, form: Form, tools: Tools) -> Adapted:
        """The conversation, with a system message for the tools where they show only in one."""
        adapted = adapt(self.prompt.messages, self.probes, self.fields, form)
        first = adapted.entries[0]
        has_system = first.role == "system"
        if not tools or self.probes.shows_tools(has_system):
            return adapted
        is_variable = self.probes.takes_system and self.probes.shows_tools(system=True)
        if is_variable or self.probes.takes_tools_in_system:
            if not has_system:
                first = Entry({"role": "system", "content": ""}, [])
                adapted.entries.insert(0, first)
            if not is_variable:
                first.message["tools"] = json.dumps(tools, ensure_ascii=False)
        return adapted

    def _rendered(self, adapted: Adapted) -> Messages:
        if self.prompt.continue_final_message and len(adapted.messages) > 1:
            return adapted.messages[:-1]
        return adapted.messages

    def _ways(self) -> Iterator[tuple[Form, Tools]]:
        tools = self.prompt.offered
        messages = self.prompt.messages
        calls = any("tool_calls" in message for message in messages)
        yield Form(), tools
        yield (
            Form(),
            completed(tools) if tools else [],
        )  # some have a loop over tools without a look
        if calls:
            yield Form(other_arguments=True), tools
        yield Form(strict=True), tools
        if calls:
            yield Form(strict=True, other_arguments=True), tools
