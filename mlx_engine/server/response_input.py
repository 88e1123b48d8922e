"""Input items of ``/v1/responses`` -> messages of a chat."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest
from mlx_engine.server.response_tools import custom_arguments, model_name

_SEAL = "mlx-engine:"  # before reasoning that comes back; what others have sealed is theirs


def seal(reasoning: str) -> str:
    """Reasoning in the form that clients send back untouched. It is no secret: they see it."""
    return _SEAL + base64.b64encode(reasoning.encode("utf-8", "surrogatepass")).decode()


Find = Callable[[str], dict[str, Any] | None]  # an item that is kept, by its id


def read_input(given: object, instructions: str | None, find: Find) -> tuple[list[Any], list[str]]:
    """Messages, and remarks on items that are left out.

    Raises:
        InvalidRequest: an item is of the wrong shape, or is not kept any more.
    """
    conversation = _Conversation(find)
    if instructions:
        conversation.messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        conversation.messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        for index, item in enumerate(given):
            conversation.add(f"number {index}", item)
    elif given is not None:
        raise InvalidRequest("input", f"must be text or a list of items, not {shown(given)}")
    return conversation.messages, list(conversation.skipped)


class _Conversation:
    """Messages so far.

    An answer is several items, and one message: what was thought, then what was said, then calls.
    """

    def __init__(self, find: Find) -> None:
        self._find = find
        self.messages: list[dict[str, Any]] = []
        self.skipped: dict[str, None] = {}
        self._answer: dict[str, Any] | None = None  # the last message, if others may join it

    def add(self, which: str, item: object) -> None:
        if not isinstance(item, dict):
            raise InvalidRequest("input", f"{which} must be an object, not {shown(item)}")
        match item.get("type", "message"):
            case "message":
                self._message(which, item)
            case "reasoning":
                self._reasoning(which, item)
            case "function_call":
                arguments = item.get("arguments")
                self._call(which, item, "{}" if arguments is None else arguments)
            case "custom_tool_call":
                self._call(which, item, custom_arguments(_text(which, item, "input")))
            case "function_call_output" | "custom_tool_call_output":
                self._answer = None
                call_id = _text(which, item, "call_id")
                content = item.get("output")
                said = {"role": "tool", "tool_call_id": call_id, "content": content}
                self.messages.append(said)
            case "item_reference":
                self._named(which, _text(which, item, "id"))
            case kind:
                self.skipped[f"items of type {shown(kind)}"] = None

    def _named(self, which: str, item_id: str) -> None:
        if (item := self._find(item_id)) is None:
            said = "this item is not kept on this server, or not any more; send the item itself"
            raise InvalidRequest("input", f"{which}: {said}")
        self.add(which, item)

    def _message(self, which: str, item: dict[str, Any]) -> None:
        role = _text(which, item, "role")
        content = item.get("content")
        if role != "assistant":
            self._answer = None
            self.messages.append({"role": role, "content": content})
            return
        self._of_answer("content", "tool_calls")["content"] = content

    def _reasoning(self, which: str, item: dict[str, Any]) -> None:
        answer = self._of_answer("content", "tool_calls")
        text = _unsealed(item.get("encrypted_content"))
        if text is None:
            text = _joined(which, item, "summary") or _joined(which, item, "content")
        if text:
            answer["reasoning_content"] = answer.get("reasoning_content", "") + text

    def _call(self, which: str, item: dict[str, Any], arguments: object) -> None:
        name = model_name(_text(which, item, "name"), item.get("namespace"))
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        call["id"] = _text(which, item, "call_id")
        self._of_answer().setdefault("tool_calls", []).append(call)

    def _of_answer(self, *without: str) -> dict[str, Any]:
        """The message of the assistant that goes on here; a new one if it has any of these."""
        if self._answer is None or any(name in self._answer for name in without):
            self._answer = {"role": "assistant"}
            self.messages.append(self._answer)
        return self._answer


def _unsealed(given: object) -> str | None:
    if not isinstance(given, str) or not given.startswith(_SEAL):
        return None
    try:
        data = base64.b64decode(given[len(_SEAL) :], validate=True)
        return data.decode("utf-8", "surrogatepass")
    except ValueError:
        return None


def _joined(which: str, item: dict[str, Any], name: str) -> str:
    """Text of a list of parts."""
    parts = item.get(name) or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InvalidRequest("input", f"{which}: {name!r} must be a list of parts")
    return "\n\n".join(_text(which, part, "text") for part in parts)


def _text(which: str, item: dict[str, Any], name: str) -> str:
    text = item.get(name)
    if not isinstance(text, str):
        raise InvalidRequest("input", f"{which}: {name!r} must be text, not {shown(text)}")
    return text
