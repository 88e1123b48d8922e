"""A conversation of Anthropic's API -> one as the engine takes it, and its tools."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest

Block = Mapping[str, Any]

_BETWEEN = "\n\n"  # of blocks of text that are not the model's own
_MEDIA = {"image": "images", "audio": "audio", "video": "videos"}
_SIGNED = "mlx-engine."  # at the beginning of the signatures that are from here


class Conversation:
    """A conversation on its way into the engine's form.

    Args:
        system: the field of that name: text, or blocks of it.
        messages: the field of that name.

    Attributes:
        messages: as ``stream_chat`` takes them.
        skipped: what was left out, in words.

    Raises:
        InvalidRequest: it is of the wrong shape, or has images for the model.
    """

    def __init__(self, system: object, messages: object) -> None:
        self.messages: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        if system is not None and (text := self._text("", _blocks("", system))):
            self.messages.append({"role": "system", "content": text})
        if not isinstance(messages, list):
            raise InvalidRequest("messages", f"must be a list, not {shown(messages)}")
        for number, message in enumerate(messages):
            self._add(number, message)

    @property
    def is_begun(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        last = self.messages[-1] if self.messages else {"role": ""}
        begun = last["role"] == "assistant" and "tool_calls" not in last
        return begun and bool(last["content"])

    def _add(self, number: int, message: object) -> None:
        if not isinstance(message, Mapping):
            raise InvalidRequest("messages", f"number {number} must be an object")
        role = message.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise InvalidRequest("messages", f"number {number}: there is no role {shown(role)}")
        which = f"number {number} ({shown(role)})"
        blocks = _blocks(which, message.get("content"))
        if role == "assistant":
            self.messages.append(self._assistant(which, blocks))
            return
        results = [block for block in blocks if block.get("type") == "tool_result"]
        others = [block for block in blocks if block.get("type") != "tool_result"]
        self.messages += [self._result(which, block) for block in results]
        if others or not results:
            self.messages.append({"role": role, "content": self._text(which, others)})

    def _assistant(self, which: str, blocks: Sequence[Block]) -> dict[str, Any]:
        texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
        for block in blocks:
            match block.get("type"):
                case "text":
                    texts.append(_string(which, block, "text"))
                case "thinking":
                    thoughts.append(_thought(block))
                case "tool_use":
                    function = {"name": block.get("name"), "arguments": block.get("input")}
                    calls.append({"id": block.get("id"), "type": "function", "function": function})
                case kind:
                    self._skip(kind)
        # Of the model's own texts nothing stood between: they are as it has written them.
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
        if thought := "".join(thoughts):
            message["reasoning_content"] = thought
        return {**message, "tool_calls": calls} if calls else message

    def _result(self, which: str, block: Block) -> dict[str, Any]:
        content = block.get("content")
        parts = [] if content is None else _blocks(which, content)
        text = "\n".join(self._part_of_result(which, part) for part in parts)
        if block.get("is_error"):
            text = f"Error: {text}"
        return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}

    def _part_of_result(self, which: str, part: Block) -> str:
        """A part of a tool's result as text. It is there for the whole session, so that one that
        the model cannot see does not end that."""
        kind = _kind(which, part)
        if kind == "tool_reference":
            return f"The tool {part.get('tool_name')} may be called now."
        if kind in _MEDIA:
            self._skip(kind)
            return f"[{_MEDIA[kind]} cannot be shown to this model]"
        return self._part(which, part) or ""

    def _text(self, which: str, blocks: Sequence[Block]) -> str:
        texts = [self._part(which, block) for block in blocks]
        return _BETWEEN.join(text for text in texts if text is not None)

    def _part(self, which: str, block: Block) -> str | None:
        """The text that a block is; ``None`` if it is left out.

        Raises:
            InvalidRequest: it is something to be seen or heard.
        """
        kind = _kind(which, block)
        if kind == "text":
            return _string(which, block, "text")
        if kind == "search_result":
            inner = _blocks(which, block.get("content", ""))
            return _BETWEEN.join([str(block.get("title", "")), self._text(which, inner)])
        source = block.get("source")
        if kind == "document" and isinstance(source, Mapping):
            if source.get("type") == "text":
                return _string(which, source, "data")
            if source.get("type") == "content":
                return self._text(which, _blocks(which, source.get("content")))
        if kind in _MEDIA or kind == "document":
            what = _MEDIA.get(kind, "documents that are no text")
            raise _wrong(which, f"{what} are not supported ({kind})")
        self._skip(kind)
        return None

    def _skip(self, kind: object) -> None:
        said = f"blocks of type {shown(kind)}"
        if said not in self.skipped:
            self.skipped.append(said)


def signature(thought: str = "") -> str:
    """The signature of a block of thinking, which comes back with it.

    Args:
        thought: what the block does not show itself.
    """
    return _SIGNED + base64.b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def functions(tools: object) -> tuple[list[dict[str, Any]], list[str]]:
    """Tools as the engine takes them, and a remark for each that runs elsewhere.

    Raises:
        InvalidRequest: they are of the wrong shape.
    """
    if tools is None:
        return [], []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequest("tools", f"must be a list of objects, not {shown(tools)}")
    made, skipped = [], []
    for tool in tools:
        kind = tool.get("type", "custom")
        if kind not in (None, "custom"):
            skipped.append(f"tools of type {shown(kind)}")
            continue
        fields = {"name": "name", "description": "description", "input_schema": "parameters"}
        function = {ours: tool[name] for name, ours in fields.items() if tool.get(name) is not None}
        made.append({"type": "function", "function": function})
    return made, list(dict.fromkeys(skipped))


def choice(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``stream_chat`` for a ``tool_choice``.

    Raises:
        InvalidRequest: there is no such choice.
    """
    kinds: dict[object, Any] = {"auto": "auto", "any": "required", "none": "none"}
    kinds["tool"] = {"type": "function", "function": {"name": given.get("name")}}
    kind = given.get("type", "auto")
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(map(repr, kinds))
        raise InvalidRequest("tool_choice", f"its type must be one of {known}, not {shown(kind)}")
    alone = bool(given.get("disable_parallel_tool_use"))
    return {"tool_choice": kinds[kind], **({"parallel_tool_calls": False} if alone else {})}


def _blocks(which: str, content: object) -> list[Block]:
    """Content as blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(block, Mapping) for block in content):
        return content
    raise _wrong(which, f"content must be text or a list of blocks, not {shown(content)}")


def _kind(which: str, block: Block) -> str:
    return _string(which, block, "type")


def _string(which: str, block: Block, name: str) -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise _wrong(which, f"the {name!r} of a block must be text, not {shown(text)}")
    return text


def _wrong(which: str, said: str) -> InvalidRequest:
    """An error in a message, or, if that has no name, in ``system``."""
    return (
        InvalidRequest("messages", f"{which}: {said}") if which else InvalidRequest("system", said)
    )


def _thought(block: Block) -> str:
    """Thoughts that a block shows, or else has in its signature."""
    text, signed = block.get("thinking"), block.get("signature")
    if isinstance(text, str) and text:
        return text
    if not isinstance(signed, str) or not signed.startswith(_SIGNED):
        return ""  # another server's
    try:
        data = base64.b64decode(signed[len(_SIGNED) :], validate=True)
        return data.decode()
    except ValueError:  # it is not as it was
        return ""
