"""Tools as a chat template takes them, and whether it shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_engine.chat.renderer import Tools
from mlx_engine.conversation import name_of_tool
from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import InvalidRequest

_MOST = 2**28  # characters that are looked at; then the rest of the tools count as shown
_NO_PARAMETERS = {"type": "object", "properties": {}}


def completed(tools: Tools) -> Tools:
    """Tools with what some templates read without a look: a description, parameters."""
    return tools and [_completed(tool) for tool in tools]


def check_shown(
    tools: list[dict[str, Any]], text: str, known: bool, *, begun: bool = False
) -> list[str]:
    """A note that names the tools which are not in a prompt, if there are any.

    Args:
        known: whether the template was seen to show tools.
        begun: whether there are calls of tools in the conversation, which then goes on without.

    Raises:
        InvalidRequest: the template shows none.
    """
    finder = _Finder(text)
    hidden, shown = [], False
    for tool in tools:
        checkpoint()
        if finder.has(_traces(tool, known)):
            shown = True
        elif finder.spent:
            break
        else:
            hidden.append(tool)
    # Where looking has come to an end, those that were looked at stand for the others.
    if hidden and not shown and not begun:
        raise InvalidRequest(
            "tools",
            "this model's chat template does not show tools to it (some do only if there is a "
            "system message); take one that is made for calls of tools, which the demo is not: "
            "engine.supports_tools says",
        )
    if not hidden:
        return []
    names = ", ".join(str(name_of_tool(tool)) for tool in hidden)
    return [f"tools: this model's chat template does not show {names}"]


class _Finder:
    """Looks for tools in a text: they stand together, so where one was found is looked first."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._near = 0  # the foremost place where one was found
        self._found = False
        self._left = _MOST

    @property
    def spent(self) -> bool:
        """Whether as much was looked at as may be."""
        return self._left <= 0

    def has(self, strings: Iterable[str]) -> bool:
        """Whether one of these is there, as far as it is still looked for."""
        return any(self._find(string) for string in strings)

    def _find(self, string: str) -> bool:
        at = self._look(string, self._near, len(self._text))
        if at < 0 and self._near:
            at = self._look(string, 0, min(self._near + len(string), len(self._text)))
        if at < 0:
            return False
        self._near = min(self._near, at) if self._found else at
        self._found = True
        return True

    def _look(self, string: str, low: int, high: int) -> int:
        if self.spent:
            return -1
        at = self._text.find(string, low, high)
        self._left -= (high if at < 0 else at + len(string)) - low
        return at


def _traces(tool: dict[str, Any], known: bool) -> Iterator[str]:
    """Strings of which a text that shows a tool has one."""
    function = tool.get("function", tool)
    if known or not isinstance(function, dict):
        string, ascii_only = name_of_tool(tool) or "", True
    else:
        # A name may stand there as a word of the language; what it is for does not.
        string, ascii_only = str(function.get("description") or ""), False
        if not string:
            return
    yield string
    if (escaped := json.dumps(string, ensure_ascii=ascii_only)[1:-1]) != string:
        yield escaped


def _completed(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return tool
    parameters = function.get("parameters")
    if not isinstance(parameters, dict) or not parameters.get("properties"):
        given = parameters if isinstance(parameters, dict) else {}
        parameters = {**_NO_PARAMETERS, **given}
    described = {"description": "", **function, "parameters": parameters}
    return (
        {**tool, "type": "function", "function": described}
        if "function" in tool
        else {
            "type": "function",
            "function": described,
        }
    )
