"""Tools of a request to ``/v1/responses``: all of them are functions to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_engine.checks import shown
from mlx_engine.errors import InvalidRequest

# What the model is told of a custom tool, whose input is text and not JSON.
_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Named:
    """A tool as its client knows it.

    Attributes:
        name: the client's.
        namespace: that the name is in.
        custom: whether its input is text.
    """

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request.

    Attributes:
        functions: as ``stream_chat`` takes them.
        choice: which of them may or must be called.
        names: of those that clients know otherwise, by the model's names.
        skipped: a remark for each kind that does not run here.
    """

    functions: list[Any] = field(default_factory=list)
    choice: Any = "auto"
    names: Mapping[str, Named] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: object, choice: object) -> Tools:
        """Read the fields ``tools`` and ``tool_choice``.

        Raises:
            InvalidRequest: they are of the wrong shape, or a tool must be called that is not there.
        """
        functions: list[Any] = []
        names: dict[str, Named] = {}
        skipped: dict[str, None] = {}
        for namespace, tool in _flat(given):
            kind = tool.get("type", "function")
            if kind not in ("function", "custom"):
                skipped[f"tools of type {shown(kind)}"] = None
                continue
            named = Named(_name("tools", tool), namespace, kind == "custom")
            if named.custom or namespace is not None:
                names[model_name(named.name, namespace)] = named
            functions.append(_function(tool, named))
        allowed, wanted = _choice(choice)
        if allowed is not None:
            functions = [each for each in functions if each["function"]["name"] in allowed]
        if wanted not in ("auto", "none") and not functions:
            raise InvalidRequest("tool_choice", "a tool must be called, but none is given")
        return cls(functions, wanted, names, tuple(skipped))

    def named(self, name: str) -> Named:
        """The tool that the model calls by a name."""
        return self.names.get(name) or Named(name)


def model_name(name: str, namespace: object) -> str:
    """The model's name for a tool: one in a namespace has that before it."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def custom_arguments(text: str) -> str:
    """The arguments of a call of a custom tool, as the model writes them."""
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: Mapping[str, Any]) -> str:
    """The input of a custom tool, out of the arguments of a call."""
    text = arguments.get("input")
    return text if isinstance(text, str) else json.dumps(arguments, ensure_ascii=False)


def _flat(given: object) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """All tools, each with its namespace."""
    for tool in _list("tools", given):
        if tool.get("type") != "namespace":
            yield None, tool
            continue
        name = _name("tools", tool)
        for each in _list("tools", tool.get("tools")):
            yield name, each


def _function(tool: Mapping[str, Any], named: Named) -> dict[str, Any]:
    function = {"name": model_name(named.name, named.namespace)}
    described = tool.get("description")
    if named.custom:
        described = _described(described, tool.get("format"))
        function["parameters"] = _INPUT  # type: ignore[assignment]
    elif tool.get("parameters") is not None:
        function["parameters"] = tool["parameters"]
    if described is not None:
        function["description"] = described
    return {"type": "function", "function": function}


def _described(text: object, form: object) -> str:
    """The description of a custom tool, with the grammar of its input, if it has one."""
    told = text if isinstance(text, str) else ""
    if isinstance(form, dict) and isinstance(rules := form.get("definition"), str):
        told += f"\n\nThe input follows this grammar ({form.get('syntax', 'lark')}):\n{rules}"
    return told.strip()


def _choice(given: object) -> tuple[set[str] | None, Any]:
    """Names of the tools that may be called, if not all may; and the engine's ``tool_choice``."""
    if given is None:
        return None, "auto"
    if not isinstance(given, dict):
        return None, given
    kind = given.get("type")
    if kind == "allowed_tools":
        allowed = _list("tool_choice", given.get("tools"))
        return {_chosen(each) for each in allowed if "name" in each}, given.get("mode", "auto")
    if kind not in ("function", "custom"):
        raise InvalidRequest("tool_choice", f"there are no tools of type {shown(kind)} here")
    return None, {"type": "function", "function": {"name": _chosen(given)}}


def _chosen(given: Mapping[str, Any]) -> str:
    return model_name(_name("tool_choice", given), given.get("namespace"))


def _name(option: str, given: Mapping[str, Any]) -> str:
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(option, f"needs a 'name', text, in {shown(dict(given))}")
    return name


def _list(option: str, given: object) -> Sequence[dict[str, Any]]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise InvalidRequest(option, f"must be a list of objects, not {shown(given)}")
    return given
