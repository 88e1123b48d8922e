"""Tools as a chat template takes them, and whether it shows them."""

from __future__ import annotations

import json
from typing import Any

from mlx_engine.chat.renderer import Tools
from mlx_engine.conversation import name_of_tool
from mlx_engine.errors import InvalidRequest

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
    hidden = [tool for tool in tools if not _is_in(text, tool, known)]
    if len(hidden) == len(tools) and not begun:
        raise InvalidRequest(
            "tools",
            "this model's chat template does not show tools to it (some do only if there is a "
            "system message)",
        )
    if not hidden:
        return []
    names = ", ".join(str(name_of_tool(tool)) for tool in hidden)
    return [f"tools: this model's chat template does not show {names}"]


def _is_in(text: str, tool: dict[str, Any], known: bool) -> bool:
    function = tool.get("function", tool)
    name = name_of_tool(tool) or ""
    if known or not isinstance(function, dict):
        return name in text or json.dumps(name)[1:-1] in text
    # A name may stand there as a word of the language; what it is for does not.
    about = str(function.get("description") or "")
    return bool(about) and (about in text or json.dumps(about, ensure_ascii=False)[1:-1] in text)


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
