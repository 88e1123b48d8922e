"""Traits of a chat template, found out by giving it tiny conversations with words to look for.

Each question is asked when a conversation needs to know, and once for a template, variables that
are alike, and whether there are tools.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, TypeVar

from mlx_engine.chat.renderer import Messages, Renderer, Tools
from mlx_engine.conversation import REASONING

Arguments = Literal["mapping", "text"]
T = TypeVar("T")

_WORDS = ("amber27", "birch38", "cedar49", "delta51", "ember62", "flint73")
_BROKEN = '{"text": "amber27'  # arguments that were cut off
_ID = "abcdef123"  # nine letters and digits suit every template
_OTHER_ID = "abcdef124"
_PLAIN_ID = "call_probe_1"
_NAME = "probe_tool"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "garnet84",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "A text."}},
            "required": ["text"],
        },
    },
}


class Probes:
    """The traits of one template with these variables. From any thread.

    Args:
        tools: whether the conversation has tools.
        variables: for the template: small ones, that stand for all that are alike.
    """

    def __init__(self, renderer: Renderer, tools: bool, variables: Mapping[str, Any]) -> None:
        self._renderer = renderer
        self._tools: Tools = [_TOOL] if tools else None
        self._variables = variables
        self._source = renderer.source(tools)
        self._known: dict[tuple[object, ...], Any] = {}  # answers to questions with arguments

    @cached_property
    def knows_developer(self) -> bool:
        """Whether the role ``developer`` is one of its own."""
        return "developer" in self._source and self._shows(_of("developer", 0), _of("user", 1))

    @cached_property
    def takes_system(self) -> bool:
        """Whether it shows a system message at the beginning, or cannot be asked."""
        return self._shows(_of("system", 0), _of("user", 1)) or not self._shows(_of("user", 1))

    @cached_property
    def takes_systems(self) -> bool:
        """Whether it shows more than one system message at the beginning."""
        return self._shows(_of("system", 0), _of("system", 1), _of("user", 2))

    def takes_system_between(self, before: str, after: str) -> bool:
        """Whether it shows a system message between messages of these roles.

        Args:
            after: empty at the end of a conversation.
        """
        return self._once(
            ("system", before, after), lambda: self._takes_system_between(before, after)
        )

    def _takes_system_between(self, before: str, after: str) -> bool:
        if after not in ("", "user", "assistant"):
            return False
        said: Messages = [_of("system", 0), _of("user", 1)]
        if before == "assistant":
            said.append(_of("assistant", 2))
        elif before == "tool":
            said += [self._call({"text": _WORDS[2]}), _result(2)]
        elif before != "user":
            return False
        said.append(_of("system", 3))
        said += [_of(after, 4)] if after else []
        return self._shows(*said)

    def takes_twice(self, role: str) -> bool:
        """Whether it shows two messages of a role one after the other, or cannot be asked."""
        first, second = _of("user", 0), _of("assistant", 1)
        plain = (first, second, _of("user", 2))
        said = (first, second, _of(role, 2), _of("user", 3))
        return self._once(("twice", role), lambda: self._shows(*said) or not self._shows(*plain))

    @cached_property
    def takes_user_after_tool(self) -> bool:
        """Whether it takes what a user says right after a result, or cannot be asked."""
        called = [_of("user", 0), self._call({"text": _WORDS[1]}), _result(2)]
        answered = [*called, _of("assistant", 3), _of("user", 4)]
        return self._takes(*called, _of("user", 3)) or not self._takes(*answered)

    @cached_property
    def arguments(self) -> Arguments:
        """The form in which it takes the arguments of past calls."""
        mapping = self._render(_of("user", 1), self._call({"text": _WORDS[0]}), _result(2))
        if mapping is not None and _WORDS[0] in mapping:
            return "mapping"
        text = self._render(_of("user", 1), self._call('{"text": "amber27"}'), _result(2))
        if text is not None and (_WORDS[0] in text or mapping is None):
            return "text"
        return "mapping"

    @cached_property
    def takes_broken(self) -> bool:
        """Whether it shows arguments that are no JSON."""
        text = self._render(_of("user", 1), self._call(_BROKEN), _result(2))
        return text is not None and _WORDS[0] in text

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether ids of calls have to be nine letters and digits."""
        arguments = self._word(0)
        plain = (_of("user", 1), self._call(arguments, _PLAIN_ID), _result(2, _PLAIN_ID))
        if self._takes(*plain):
            return False
        return self._takes(_of("user", 1), self._call(arguments), _result(2))

    @cached_property
    def wants_ids(self) -> bool:
        """Whether calls have to have ids."""
        call, bare = self._call(self._word(0)), self._call(self._word(0), None)
        return not self._takes(_of("user", 1), bare, _result(2, None)) and self._takes(
            _of("user", 1), call, _result(2)
        )

    @cached_property
    def takes_calls_together(self) -> bool:
        """Whether it shows two calls of one message, or those of two no better."""
        one, other = (self._call(self._word(n), id) for n, id in ((0, _ID), (1, _OTHER_ID)))
        both = {**one, "tool_calls": [*one["tool_calls"], *other["tool_calls"]]}
        results = _result(2), _result(3, _OTHER_ID)
        together = self._render(_of("user", 4), both, *results)
        if together is not None and _in_order(together, _WORDS[:2]):
            return True
        apart = self._render(_of("user", 4), one, results[0], other, results[1])
        if apart is None:
            return True
        return together is not None and not _in_order(apart, _WORDS[:2])

    @cached_property
    def takes_thoughts_with_calls(self) -> bool:
        """Whether it takes reasoning in a message that has a text and calls, or never."""
        call = self._call(self._word(0)) | {"content": _WORDS[1]}
        thought = call | dict.fromkeys(REASONING, _WORDS[2])
        answer = _result(3)
        return self._takes(_of("user", 4), thought, answer) or not self._takes(
            _of("user", 4), call, answer
        )

    @cached_property
    def shows_calls(self) -> bool:
        """Whether calls of earlier turns are in the prompt."""
        return self._past is None or _WORDS[0] in self._past

    @cached_property
    def shows_results(self) -> bool:
        """Whether results of earlier turns are in the prompt."""
        return self._past is None or _WORDS[2] in self._past

    def shows_tools(self, system: bool) -> bool:
        """Whether the tools are in the prompt.

        Args:
            system: whether there is a system message.
        """
        return self._once(("tools", system), lambda: self._shows_tools(system))

    def _shows_tools(self, system: bool) -> bool:
        said = [_of("system", 0)] if system else []
        text = self._render(*said, _of("user", 1))
        return text is None or _NAME in text or "garnet84" in text

    @cached_property
    def takes_tools_in_system(self) -> bool:
        """Whether it shows tools that a system message has, as a text."""
        message = _of("system", 0) | {"tools": json.dumps([_TOOL])}
        text = self._render(message, _of("user", 1))
        return text is not None and _NAME in text

    def generation_prompt(self, role: str) -> str | None:
        """The text behind a last message of this role; ``None`` if that cannot be told apart."""
        return self._once(("generation", role), lambda: self._generation_prompt(role))

    def _generation_prompt(self, role: str) -> str | None:
        said: Messages = [_of("user", 0)]
        if role == "tool":
            said += [self._call(self._word(1)), _result(2)]
        elif role == "assistant":
            said.append(_of("assistant", 1))
        elif role != "user":
            said.insert(0, _of(role, 1))
        whole, without = self._render(*said), self._render(*said, generation=False)
        if whole is None or without is None or not whole.startswith(without):
            return None
        return whole[len(without) :]

    @cached_property
    def plain(self) -> str | None:
        """The shortest conversation, for what a variable makes of it; ``None`` if refused."""
        return self._render(_of("user", 0))

    @cached_property
    def sample(self) -> str:
        """A conversation with all that it can show, as far as it takes that; for its markers."""
        call = self._call(self._word(0)) | {"reasoning_content": _WORDS[3]}
        texts = (
            self._render(_of("user", 1), call, _result(2)),
            self._render(_of("user", 1)),
        )
        return "".join(text for text in texts if text is not None)

    @cached_property
    def _past(self) -> str | None:
        said = (self._call(self._word(0)), _result(2), _of("assistant", 3), _of("user", 4))
        return self._render(_of("user", 1), *said)

    def _once(self, question: tuple[object, ...], ask: Callable[[], T]) -> T:
        if question not in self._known:
            self._known[question] = ask()
        known: T = self._known[question]
        return known

    def _word(self, number: int) -> dict[str, str] | str:
        """Arguments with this word, in the form that it takes."""
        word = _WORDS[number]
        return {"text": word} if self.arguments == "mapping" else f'{{"text": "{word}"}}'

    def _call(self, arguments: dict[str, str] | str, call_id: str | None = _ID) -> dict[str, Any]:
        function = {"name": _NAME, "arguments": arguments}
        given = {} if call_id is None else {"id": call_id}
        call = {"type": "function", **given, "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def _render(self, *messages: dict[str, Any], generation: bool = True) -> str | None:
        return self._renderer.attempt(
            list(messages), self._tools, self._variables, generation=generation
        )

    def _takes(self, *messages: dict[str, Any]) -> bool:
        return self._render(*messages) is not None

    def _shows(self, *messages: dict[str, Any]) -> bool:
        text = self._render(*messages)
        return text is not None and _in_order(text, [each["content"] for each in messages])


def _of(role: str, number: int) -> dict[str, Any]:
    return {"role": role, "content": _WORDS[number]}


def _result(number: int, call_id: str | None = _ID) -> dict[str, Any]:
    given = {} if call_id is None else {"tool_call_id": call_id}
    return {"role": "tool", "name": _NAME, **given, "content": _WORDS[number]}


def _in_order(text: str, words: Any) -> bool:
    at = 0
    for word in words:
        if not word:
            continue
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True
