"""The error for a conversation that a chat template refuses, with the message that it is about."""

from __future__ import annotations

from collections.abc import Callable

from mlx_engine.chat.messages import LEADING, Entry
from mlx_engine.chat.renderer import Messages
from mlx_engine.errors import InvalidRequest


def refusal(
    error: Exception, entries: list[Entry], takes: Callable[[Messages], bool]
) -> InvalidRequest:
    """The error, for the shortest beginning of the conversation that is refused.

    Args:
        error: what the template has raised.
        entries: of the conversation.
        takes: whether the template takes a beginning of it.
    """
    messages = [entry.message for entry in entries]
    roles = [entry.role for entry in entries]
    first = roles.index("user") + 1 if "user" in roles else 1
    said = f"the model's chat template refuses it: {error}"
    if first >= len(messages) or not takes(messages[:first]):
        if len(messages) == 1:
            return InvalidRequest("messages", f"{entries[0].named}: {said}")
        early = next((e for e in entries[: first - 1] if e.role not in LEADING), None)
        if early is not None and takes(messages[first - 1 : first]):
            return InvalidRequest("messages", f"{early.named}: {said}")
        return InvalidRequest("messages", f"the model's chat template refuses them: {error}")
    taken, refused = first, len(messages)
    while refused - taken > 1:
        middle = (taken + refused) // 2
        taken, refused = (middle, refused) if takes(messages[:middle]) else (taken, middle)
    return InvalidRequest("messages", f"{entries[refused - 1].named}: {said}")
